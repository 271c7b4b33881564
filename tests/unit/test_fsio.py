"""Files that survive: atomic JSON with checksums, locks, holes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import (
    FileLock,
    disk_errors,
    json_checksum,
    punch_hole,
    read_all,
    read_json,
    remove_durably,
    write_atomic,
    write_json,
)  # fmt: skip
from tests.waiting import pass_time


def test_json_comes_back(tmp_path: Path) -> None:
    content = {"b": [1, None, "ä"], "a": {"x": 1.5, "y": 2**63}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert json_checksum({"b": 1, "a": "ä"}) == json_checksum({"a": "ä", "b": 1, "checksum": "no"})
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["x.json"]


def test_one_flipped_bit_in_json_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    content = {"number": 12, "name": "set", "list": [1, 2]}
    write_json(path, content)
    raw = path.read_bytes()
    for at in range(len(raw)):
        for bit in range(8):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :])
            same = _content_or_message(path)
            assert same == content or (str(path) in str(same) and "offset" in str(same))


def _content_or_message(path: Path) -> object:
    try:
        return read_json(path)
    except DamageError as damage:
        return damage.message


def test_a_file_of_which_it_is_not_sure_that_it_is_gone_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a command that has ended: what its error says, the same again, must find it."""
    path, sync, failing = tmp_path / "protect.json", os.fsync, True

    def fails_once(fd: int) -> None:
        nonlocal failing
        if failing:
            failing = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(fd)

    write_json(path, {"step": "remove"})
    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OSError, match="Input/output error"):
        remove_durably(path)
    assert read_json(path) == {"step": "remove"}
    remove_durably(path)
    assert os.listdir(tmp_path) == []


def test_replacing_a_file_leaves_the_old_one_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")
    with path.open("rb") as old:
        write_atomic(path, b"new")
        assert old.read() == b"old"
    assert path.read_bytes() == b"new"


def test_second_lock_is_refused_with_the_holder(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / "lock", "the agent"),
        pytest.raises(PreconditionError, match=f"the agent, process {os.getpid()}"),
    ):
        FileLock(tmp_path / "lock", "the agent")
    FileLock(tmp_path / "lock", "the agent").release()


BEGINS_A_CHILD = """
import os, sys
from pathlib import Path
from pgcdp.fsio import FileLock
lock = FileLock(Path(sys.argv[1]), "a command")
if os.fork() == 0:
    os.close(1)
    os.read(0, 1)
    os._exit(0)
print("begun", flush=True)
os.waitpid(-1, 0)
"""


def test_a_killed_command_does_not_keep_its_lock_while_a_child_of_it_begins(tmp_path: Path) -> None:
    """A child has its parent's files until it is another program."""
    words = [sys.executable, "-P", "-c", BEGINS_A_CHILD, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stdin is not None
        assert command.stdout.readline() == b"begun\n"
        command.kill()
        command.wait()
        with ThreadPoolExecutor(1) as beside:
            lock = beside.submit(FileLock, tmp_path / "lock", "a command")
            pass_time(0.1)
            assert not lock.done()
            command.stdin.close()
            lock.result(timeout=4).release()


def test_who_only_asks_whether_it_is_locked_keeps_nobody_from_it(tmp_path: Path) -> None:
    """He has it shared for a moment (is_locked), and so has a child that he starts just then."""
    path = tmp_path / "lock"
    with ThreadPoolExecutor(1) as beside, path.open("wb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        lock = beside.submit(FileLock, path, "a command")
        pass_time(0.1)
        assert not lock.done()
        fcntl.flock(asking, fcntl.LOCK_UN)
        lock.result(timeout=60).release()


def test_hole_reads_as_zeros_and_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * (1 << 20))
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        punch_hole(fd, 5000, 900000)
        data = read_all(fd, 1 << 20, 0)
        assert data == b"x" * 5000 + bytes(900000) + b"x" * ((1 << 20) - 905000)
        assert os.fstat(fd).st_blocks * 512 < 200000
    finally:
        os.close(fd)


def test_what_a_disk_says_is_no_bug_and_names_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PgcdpError) as told, disk_errors("mend that, then run it again"):
        (tmp_path / "no" / "file").write_bytes(b"x")
    assert type(told.value) is PgcdpError
    assert (str(tmp_path / "no" / "file") in told.value.message, told.value.hint) == (
        True,
        "mend that, then run it again",
    )
    with pytest.raises(BrokenPipeError), disk_errors("mend that"):
        raise BrokenPipeError  # of who reads what a command says
    with pytest.raises(PreconditionError, match="as it was"), disk_errors("mend that"):
        raise PreconditionError("as it was")
