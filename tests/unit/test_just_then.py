"""What vanishes, breaks off, or is collected by another thread just then is no bug of ours, and told as what it is."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pgcdp import looking, service
from pgcdp.capture import children, engine, holder
from pgcdp.config import Config
from pgcdp.errors import DamageError
from pgcdp.intervals.indexing import newest_look
from pgcdp.serving.answers import Answers, Json
from pgcdp.serving.keeping import Keeping
from pgcdp.serving.questions import Questions
from tests.small_store import make_store
from tests.unit.test_config import sample
from tests.waiting import pass_time, wait_until


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = sample(root=tmp_path, journal=tmp_path / "journal")
    made.paths.run.mkdir(parents=True)
    made.journal.mkdir()
    return made


def test_what_an_engine_died_of_is_told_also_when_another_thread_has_collected_it(tmp_path: Path) -> None:
    """The keeper collects all that have ended; the command that started one said "exit code 1" of damage then."""
    log = tmp_path / "log"
    with engine._log_of(log) as file:
        pid = children.spawn(["/bin/sh", "-c", "echo 'error: the journal is damaged' >&2; exit 5"], file, {})

    def collected() -> bool:
        children.reap()
        return pid not in children._children

    wait_until(collected, what="its end")
    with pytest.raises(DamageError, match="the journal is damaged"):
        engine._await(lambda: False, pid, log, 0, 10.0)


def test_an_agent_that_is_killed_in_the_midst_of_its_answer_is_gone(config: Config) -> None:
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(os.fspath(config.paths.agent_socket))
        listener.listen()
        asked = pool.submit(service.ask, config.paths, "status")
        door, _ = listener.accept()
        with door:
            assert door.recv(100) == b'{"cmd": "status"}\n'
            door.sendall(b'{"pid": 17, "pha')
        with pytest.raises(service.AgentGone, match="ended meanwhile"):
            asked.result(timeout=30)


def test_who_keeps_an_agent_outlives_that_none_can_be_started(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written waits for room in the journal without end, when the disk of its log was full for a moment."""
    monkeypatch.setattr(service, "KEEP_SECONDS", 0.01)
    before = set(threading.enumerate())
    with service.kept(config):
        (keeper,) = set(threading.enumerate()) - before
        pass_time(0.3)  # its log is in no directory
        assert keeper.is_alive(), "nobody starts one any more"


def test_an_agent_ends_in_order_whatever_its_last_look_came_to(tmp_path: Path, config: Config) -> None:
    """Else it keeps the store's lock marked as held, and the journal what it has taken already."""
    store = make_store(tmp_path)
    shutil.rmtree(store.path)

    async def directly(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    async def ends() -> None:
        questions = Questions(config, directly)
        looking_at: Awaitable[Any] = directly(newest_look, store, 3)
        questions._looking = asyncio.ensure_future(looking_at)
        await asyncio.wait({questions._looking})
        await questions.end_look()

    asyncio.run(ends())


def test_a_capture_process_may_come_up_when_its_agent_has_ended(config: Config) -> None:
    if holder.missing() is not None:
        pytest.skip(f"no holder here: {holder.missing()}")
    keeping = Keeping(config)
    keeping.start()
    keeping.close()  # waits for a start, but not for ever
    keeping._tell("died", 11.0)


def test_a_segment_that_is_renamed_as_the_journal_is_measured(config: Config) -> None:
    (config.journal / f"{1:016d}.seg").write_bytes(bytes(4096))
    (config.journal / f"{2:016d}.seg").symlink_to("gone")  # listed, and not there when it is looked at
    assert looking.journal_bytes(config) == 4096


def test_a_disk_that_is_full_as_the_agent_answers_is_told_as_that(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    async def grow(request: Json) -> Json:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/backup/main/image/data.img")

    caplog.set_level(logging.ERROR)
    told = asyncio.run(Answers({"grow": grow}, config.paths.agent_log)._reply(b'{"cmd": "grow"}'))
    assert told["error"]["kind"] == "error"
    assert told["error"]["message"] == "/backup/main/image/data.img: no space left on device (error 28)"
    assert not caplog.records, "that is no bug of ours"
