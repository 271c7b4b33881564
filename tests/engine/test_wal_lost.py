"""WAL that was not seen is told, also before the first page that was."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pgcdp.postgres.wal import Manager, read_notes
from pgcdp.units import format_lsn
from tests.wal_writer import PAGE, SEGMENT, SYSTEM, Wal, write_interval

Lost = Callable[[list[int], int], list[tuple[int, int, int]]]
"""What is lost, as LSNs and the write where reading goes on, when these pages are written in turn and reading shall
begin at an LSN."""

RING = 32 << 20
"""How far behind the next record a segment begins that says: what lies before it will not come any more."""


@pytest.fixture(scope="module")
def wal() -> Wal:
    made = Wal()
    while made.at < 3 * SEGMENT + RING:
        made.record(3 * PAGE + 1000)
    return made


@pytest.fixture
def lost(engine_program: Path, tmp_path: Path, wal: Wal) -> Lost:
    def run(pages: list[int], start: int) -> list[tuple[int, int, int]]:
        place = write_interval(tmp_path / "interval", [(page, bytes(wal.pages[page])) for page in pages])
        out = tmp_path / "out"
        out.mkdir()
        words = [str(engine_program), "wal", "--system-identifier", str(SYSTEM), "--segment-bytes", str(SEGMENT)]
        words += ["--start-lsn", format_lsn(start)] if start else []
        subprocess.run([*words, "--out", str(out), str(place)], check=True)
        notes = read_notes((out / "notes").read_bytes())
        return [(note.lsn, note.end_lsn, note.write) for note in notes if note.rmid == Manager.LOST]

    return run


def begins(wal: Wal, page: int) -> int:
    """Where the first record begins in a page or behind it."""
    return next(end for end in wal.ends if end >= page) if page > SEGMENT else SEGMENT


def test_what_lies_before_the_first_page_is_lost(lost: Lost, wal: Wal) -> None:
    """A record that begins in an interval before ends here: the transaction that it ends is in no index."""
    pages = sorted(wal.pages)
    start = wal.ends[1]
    first = next(i for i, page in enumerate(pages) if page > start and begins(wal, page) < page + PAGE)
    assert lost(pages[first : first + 40], start) == [(start, begins(wal, pages[first]), 1)]


def test_nothing_is_lost_when_reading_begins_within_the_first_page(lost: Lost, wal: Wal) -> None:
    pages = sorted(wal.pages)
    first = next(i for i, page in enumerate(pages[1:], 1) if begins(wal, page) < page + PAGE - 100)
    start = begins(wal, pages[first])
    assert lost(pages[first : first + 40], start) == []


def test_nothing_is_lost_before_an_unknown_beginning(lost: Lost, wal: Wal) -> None:
    assert lost(sorted(wal.pages)[4:40], 0) == []


def test_a_hole_is_lost(lost: Lost, wal: Wal) -> None:
    pages = sorted(wal.pages)
    segment = 2 * SEGMENT + RING
    assert segment in pages
    whole = [end for end in wal.ends if end <= pages[30]][-1]
    assert lost([*pages[:30], *(page for page in pages if page >= segment)], wal.ends[0]) == [(whole, segment, 31)]
