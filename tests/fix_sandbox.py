"""Fixtures of sandboxes: a place for one, and the oldest programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgcdp.postgres.cluster import Binaries
from tests.fix_postgres import BindirOf
from tests.scratch import scratch_directory


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that user postgres may enter; it must be empty but for `copy*` when the test ends."""
    path = scratch_directory("place")
    yield path
    left = sorted(each.name for each in path.iterdir() if not each.name.startswith("copy"))
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(path) in line]
    shutil.rmtree(path)
    assert (left, mounts) == ([], [])


@pytest.fixture
def pg15(binaries_of: BindirOf) -> Binaries:
    return binaries_of(15)
