"""WAL whose pages the filesystem tore apart is followed, whatever else is written beside them and between them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pgcdp.postgres.wal import first_notes
from pgcdp.records import BLOCK, WAL_WRITE
from tests.wal_writer import PAGE, SEGMENT, SYSTEM, Wal, write_interval

LOST = 255
Writes = list[tuple[int, bytes]]
Read = Callable[[Writes], list[int]]

DATA = 64 << 20
"""Where other files lie."""
WAL = 1 << 20
"""Where pages lie, one behind another, that are not torn apart."""
SECOND = 32 << 20
"""Where the second half of the torn page lies."""
TORN = 2 * SEGMENT - PAGE
"""That page, the last one of its segment."""
NEIGHBOUR = WAL + TORN - SEGMENT + BLOCK
"""The block behind its first half."""


@pytest.fixture
def read(engine_program: Path, tmp_path: Path) -> Read:
    """Up to which LSN is read: at once, and for many ways to cut the writes in two by the second of two runs."""

    def run(place: Path, *options: str) -> int:
        out = tmp_path / "out"
        out.mkdir()
        words = [str(engine_program), "wal", "--system-identifier", str(SYSTEM), "--segment-bytes", str(SEGMENT)]
        done = subprocess.run(
            [*words, *options, "--out", str(out), str(place)], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        rows = np.fromfile(out / "wal", dtype=WAL_WRITE)
        assert LOST not in [note.rmid for note in first_notes((out / "notes").read_bytes(), 1 << 20)[0]]
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
        return int(rows["to_lsn"].max(initial=0))

    def both(writes: Writes) -> list[int]:
        place = write_interval(tmp_path / "interval", writes)
        reached = [run(place)]
        state = tmp_path / "state"
        for cut in range(1, len(writes), 1 + len(writes) // 60):
            run(place, "--upto", str(cut), "--save-state", str(state))
            reached.append(run(place, "--state", str(state)))
            state.unlink()
        return reached

    return both


def two_segments() -> Wal:
    """A record begins in the first half of the torn page and ends in the next segment."""
    wal = Wal()
    while wal.at < TORN + 1000:
        wal.record(1500)
    wal.record(3 * PAGE)
    wal.record(1500)
    return wal


def place_of(page: int) -> int:
    return WAL + page - SEGMENT


def before_torn(wal: Wal) -> Writes:
    """Flushes of the segment up to the torn page."""
    pages = [page for page in sorted(wal.pages) if page < TORN]
    return [(place_of(page), bytes(wal.pages[page])) for page in pages[-4:]]


def behind_torn(wal: Wal) -> Writes:
    """The next segment, which lies elsewhere."""
    return [(place_of(page) + (16 << 20), bytes(wal.pages[page])) for page in sorted(wal.pages) if page > TORN]


def others(count: int, seed: int = 0) -> Writes:
    """Writes to other files, each elsewhere."""
    return [(DATA + (seed + n) * 3 * BLOCK, bytes([n % 251 + 1]) * (2 * BLOCK)) for n in range(count)]


def assert_followed(read: Read, wal: Wal, writes: Writes) -> None:
    whole, *parts = read(writes)
    assert whole == wal.at
    assert [part for part in parts if part != wal.at] == []


@pytest.mark.parametrize("first", [0, 1], ids=["first-half-first", "second-half-first"])
def test_the_block_behind_a_first_half_may_be_anothers(read: Read, first: int) -> None:
    """As that of the next segment, whose last byte is written when it is made."""
    wal = two_segments()
    halves = [(place_of(TORN), wal.half(TORN, 0)), (SECOND, wal.half(TORN, 1))]
    writes = [*before_torn(wal), halves[first], halves[1 - first], (NEIGHBOUR, bytes(BLOCK)), *behind_torn(wal)]
    assert_followed(read, wal, writes)


def test_the_block_behind_a_first_half_may_have_been_anothers(read: Read) -> None:
    wal = two_segments()
    halves = [(place_of(TORN), wal.half(TORN, 0)), (SECOND, wal.half(TORN, 1))]
    assert_followed(read, wal, [*before_torn(wal), (NEIGHBOUR, bytes(BLOCK)), *halves, *behind_torn(wal)])


@pytest.mark.parametrize("count", [70, 400])
def test_the_rest_of_a_record_may_come_late(read: Read, count: int) -> None:
    """The next segment is made while a checkpoint writes."""
    wal = two_segments()
    halves = [(place_of(TORN), wal.half(TORN, 0)), (SECOND, wal.half(TORN, 1))]
    writes = [*before_torn(wal), *halves, *others(count), *behind_torn(wal)]
    assert_followed(read, wal, writes)


def test_a_second_half_may_be_in_the_middle_of_a_write(read: Read) -> None:
    """The block layer makes one write of those that are for neighbouring blocks."""
    wal = two_segments()
    page = TORN - PAGE
    last = (SECOND - PAGE, bytes(wal.pages[page]) + wal.half(TORN, 1))
    writes = [*before_torn(wal)[:-1], (place_of(TORN), wal.half(TORN, 0)), last, *behind_torn(wal)]
    assert_followed(read, wal, writes)


def test_a_second_half_may_lie_where_an_older_page_had_one(read: Read) -> None:
    """The segment of that page was removed."""
    wal = two_segments()
    pages = [page for page in sorted(wal.pages) if page < TORN][-4:]
    old = (SECOND - BLOCK, bytes(wal.pages[pages[0]]))
    halves = [(place_of(TORN), wal.half(TORN, 0)), (SECOND, wal.half(TORN, 1))]
    assert_followed(read, wal, [old, *before_torn(wal)[1:], *halves, *behind_torn(wal)])


def test_a_torn_page_is_written_again_and_again(read: Read) -> None:
    """Its first half, and in the same write the block behind it, which is another's."""
    wal = Wal()
    while wal.at < TORN + BLOCK + 1000:
        wal.record(1500)
    halves = [(place_of(TORN), wal.half(TORN, 0)), (SECOND, wal.half(TORN, 1))]
    writes = [*before_torn(wal), *halves]
    wal.record(1500)
    again = (place_of(TORN), wal.half(TORN, 0) + b"x" * BLOCK)
    writes += [(SECOND, wal.half(TORN, 1)), again]
    wal.record(3 * PAGE)
    writes += [(SECOND, wal.half(TORN, 1)), again, *behind_torn(wal)]
    assert_followed(read, wal, writes)


def test_a_record_may_be_right_with_another_block_too(read: Read) -> None:
    """All that it has in the second half is zeros."""
    wal = Wal()
    while wal.at < TORN + 1000:
        wal.record(1500)
    wal.record(TORN + BLOCK + 64 - wal.at, zeros=100)
    first = wal.half(TORN, 0)
    wal.record(1500)
    wal.record(1500)
    second = wal.half(TORN, 1)
    writes = [*before_torn(wal), (DATA, bytes(2 * BLOCK)), (place_of(TORN), first), (SECOND, second)]
    wal.record(3 * PAGE)
    assert wal.half(TORN, 0) == first
    writes += [(place_of(TORN), first), (SECOND, wal.half(TORN, 1)), *behind_torn(wal)]
    assert_followed(read, wal, writes)
