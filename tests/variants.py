"""Which of the variants of a test `script/test` takes: the same test on 15, 17 and 18, on ext4 and xfs, on both builds.

All of them are a third of the time that the tests take. One for each test is taken, always the same one but another for
another test, so that all versions, filesystems and builds are met; `script/test --all` takes every one. A test that is
marked `every_variant` is always run on all.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

VARYING = ("pg_binaries", "fs", "engine_program")
"""Parameters whose values are variants; the other ones are different tests."""
STAY = ("every_variant", "soak", "skip", "skipif")
"""Marks of what is never left out for another nor taken for it: one that is skipped would stand for one that runs."""
WHERE = ("cluster", "crash", "engine")
"""Rooms of tests whose variants take long."""


@dataclass(frozen=True, slots=True)
class Case:
    """One test, and which value it has of each parameter, counted from 0."""

    test: str
    values: Mapping[str, int]

    @property
    def what(self) -> tuple[str, tuple[tuple[str, int], ...]]:
        """The test without what varies."""
        return self.test, tuple(sorted(each for each in self.values.items() if each[0] not in VARYING))


def left_out(cases: Sequence[Case]) -> list[int]:
    """Places of the cases that are variants of others that are taken."""
    variants = defaultdict[object, list[int]](list)
    for place, case in enumerate(cases):
        variants[case.what].append(place)
    taken = {places[zlib.crc32(repr(what).encode()) % len(places)] for what, places in variants.items()}
    return [place for place in range(len(cases)) if place not in taken]


def split(items: Iterable[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests that are taken, and those that are left out."""
    items = list(items)
    several = [item for item in items if _varies(item)]
    cases = [Case(item.nodeid.partition("[")[0], item.callspec.indices) for item in several]  # type: ignore[attr-defined]
    out = [several[place] for place in left_out(cases)]
    gone = set(map(id, out))
    return [item for item in items if id(item) not in gone], out


def _varies(item: pytest.Item) -> bool:
    if Path(item.path).parent.name not in WHERE or not hasattr(item, "callspec"):
        return False
    return not any(mark.name in STAY for mark in item.iter_markers())
