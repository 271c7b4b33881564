"""What an engine is started with is what it was given, whatever numbers the descriptors happen to have here."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from pgcdp.capture.sharing import captures_at
from tests.waiting import wait_named

SHELL = """
read line; echo log $line; echo held >/proc/$$/fd/100
for n in $(seq 101 120); do [ ! -e /proc/$$/fd/$n ] || echo $n is left; done
"""
STARTER = """
import os, sys
from pgcdp.capture import children, engine
numbers = [int(word) for word in sys.argv[2:]]
for kind, number in zip(("log", "until", "held"), numbers, strict=True):
    fd = os.open(kind, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(fd, number, inheritable=False)
    os.close(fd)
log, until, held = numbers
pid = children.spawn(["/bin/sh", "-c", sys.argv[1]], log, {0: until, engine._HELD: held})
os.waitpid(pid, 0)
"""
"""A process of its own: here the numbers may be somebody's."""


@pytest.mark.parametrize("numbers", list(itertools.permutations(("100", "101", "102"))), ids=str)
def test_no_descriptor_takes_the_place_of_another(tmp_path: Path, numbers: tuple[str, ...]) -> None:
    """A process that has many files open gives the log the number that the kept descriptor gets in the engine."""
    for kind, content in (("log", ""), ("until", "line\n"), ("held", "")):
        (tmp_path / kind).write_text(content)
    subprocess.run([sys.executable, "-P", "-c", STARTER, SHELL, *numbers], check=True, cwd=tmp_path)
    assert (tmp_path / "log").read_text() == "log line\n"
    assert (tmp_path / "held").read_text() == "held\n"
    assert (tmp_path / "until").read_text() == "line\n"


def test_a_capture_process_is_known_before_it_is_one(tmp_path: Path) -> None:
    """As the shell that starts it: as soon as nobody else may start one."""
    control = tmp_path / "control"
    shell = ["/bin/sh", "-c", 'read line; exec "$@"', "sh", "/bin/true", "capture", "--set-id", "1", "--control"]
    with subprocess.Popen([*shell, str(control)], stdin=subprocess.PIPE) as starting:
        wait_named(starting.pid)
        assert captures_at(control) == {starting.pid}
        assert captures_at(tmp_path / "other") == set()
        assert starting.stdin is not None
        starting.stdin.write(b"on\n")
    assert captures_at(control) == set()
