"""What an engine is started with is what it was given, whatever numbers the descriptors happen to have here."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from pgcdp.capture import engine

PROGRAM = """
read line; echo log $line; echo held >/proc/$$/fd/100
for n in $(seq 101 120); do [ ! -e /proc/$$/fd/$n ] || echo $n is left; done
"""
KINDS = ("log", "until", "held")
NUMBERS = (100, 101, 102)


@pytest.mark.parametrize("numbers", list(itertools.permutations(NUMBERS)), ids=str)
def test_no_descriptor_takes_the_place_of_another(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    """A process that has many files open gives the log the number that the kept descriptor gets in the engine."""
    for kind, number in zip(KINDS, numbers, strict=True):
        path = tmp_path / kind
        path.write_text("line\n" if kind == "until" else "")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
    log, until, held = numbers
    try:
        pid = engine._spawn(["/bin/sh", "-c", PROGRAM], log, {0: until, engine._HELD: held})
        os.waitpid(pid, 0)
        engine._children.discard(pid)
    finally:
        for number in numbers:
            os.close(number)
    assert (tmp_path / "log").read_text() == "log line\n"
    assert (tmp_path / "held").read_text() == "held\n"
    assert (tmp_path / "until").read_text() == "line\n"
