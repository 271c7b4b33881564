"""A command is killed just as it starts a capture process: that one comes up alone, or not at all.

Its starter's locks are gone, and it has not the journal's yet: whoever starts another one beside it has two, of which
one dies with an error.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pgcdp.capture import held
from pgcdp.capture.control import EngineClient
from pgcdp.config import Config
from tests.unit.test_config import sample
from tests.waiting import wait_named


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "journal").mkdir()
    made = sample(journal=tmp_path / "journal", root=tmp_path)
    made.paths.run.mkdir(parents=True)
    return made


@pytest.fixture
def left(config: Config) -> Iterator[subprocess.Popen[bytes]]:
    """The shell that becomes the engine when it reads a line; whoever started it is dead."""
    shell = ["/bin/sh", "-c", 'read line; exec "$@"', "sh", "/bin/true", "capture", "--set-id", "1", "--control"]
    with subprocess.Popen([*shell, str(config.paths.control)], stdin=subprocess.PIPE) as process:
        wait_named(process.pid)
        yield process
        process.kill()


def test_it_is_waited_for(config: Config, left: subprocess.Popen[bytes]) -> None:
    with ThreadPoolExecutor(1) as pool:
        serves = pool.submit(held._serves, config, EngineClient(config.paths.control))
        try:
            with pytest.raises(TimeoutError):
                serves.result(timeout=0.5)
        finally:
            left.communicate(b"on\n")
        assert serves.result(timeout=60) is False, "it ended and never served: another one may start"


def test_who_cuts_off_the_set_ends_it_too(config: Config, left: subprocess.Popen[bytes]) -> None:
    held.cut_off(config.paths)
    assert left.wait(timeout=60) == -9
