"""Gaps as the writes tell of them, and that no write and no time inside of one is ever a recovery point."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import xxhash

from pgcdp.capture.journal import Journal
from pgcdp.capture.tracked import unrecorded_gap
from pgcdp.errors import DamageError, TargetError
from pgcdp.fsio import read_json
from pgcdp.records import GAP_BEGIN, GAP_END, Gap, Volume
from pgcdp.recovery.gaps import refuse_in_gap, refuse_time_in_gap, with_unrecorded
from pgcdp.store.gaps import MARKER, GapFinder, announce, gap_name, keep, kept
from pgcdp.store.layout import Store
from pgcdp.store.rewinds import rewind_records
from tests.golden.make_golden import BLOCK, MARK, SET_ID, Item, JournalMaker, write


def record(flags: int, name: str) -> Item:
    return Item(MARK, 65535, 0, name.encode(), flags=flags)


NAME = gap_name("changed", 77)
BEGIN, END = record(GAP_BEGIN, NAME), record(GAP_END, NAME)
UNTRACKED = record(GAP_BEGIN, gap_name("untracked", 1000))
DATA = write(0, 8 * BLOCK, bytes(3 * BLOCK))


def found_in(place: Path, items: list[Item], sizes: list[int] | None = None) -> list[Gap]:
    """Those in a journal with these writes, which is read in runs of as many batches as come."""
    maker = JournalMaker(place, segment_bytes=64 * BLOCK)
    maker.segment()
    rest = list(items)
    for size in sizes or [1] * len(items):
        if rest:
            maker.batch(*rest[:size])
            del rest[:size]
    finder = GapFinder()
    for run in Journal(place, SET_ID).batches(0, None):
        assert not len(rewind_records(run.records)), "a gap is no rewind"
        for at in range(0, len(run.records), 2):
            part = run.records[at : at + 2]
            finder.take(part, lambda row, at=at, run=run: run.data_of(at + row).tobytes())  # type: ignore[misc]
    return finder.found


def test_a_gap_is_what_lies_between_its_records(tmp_path: Path) -> None:
    items = [DATA, BEGIN, DATA, DATA, END, DATA]
    (gap,) = found_in(tmp_path / "j", items)
    assert (gap.begin, gap.end, gap.reason, gap.since_ns, gap.blocks) == (2, 5, "changed", 77, 6)
    assert gap.to_ns is not None


def test_a_killed_healing_begins_again_and_is_one_gap(tmp_path: Path) -> None:
    chooser = random.Random(5)
    for number in range(20):
        before, first, second, behind = (chooser.randrange(4) for _ in range(4))
        items = [DATA] * before + [BEGIN] + [DATA] * first + [BEGIN] + [DATA] * second + [END] + [DATA] * behind
        sizes = [chooser.randrange(1, 4) for _ in items]
        (gap,) = found_in(tmp_path / str(number), items, sizes)
        assert (gap.begin, gap.end, gap.blocks) == (before + 1, before + first + second + 3, 3 * (first + second))


def test_a_gap_that_goes_on_has_no_end(tmp_path: Path) -> None:
    done, left = found_in(tmp_path / "j", [BEGIN, END, DATA, BEGIN, DATA])
    assert (done.end, done.blocks) == (2, 0)
    assert (left.begin, left.end, left.to_ns, left.blocks) == (4, None, None, 3)


@pytest.mark.parametrize(
    "items",
    [
        [END],
        [BEGIN, END, END],
        [record(GAP_BEGIN, "changed")],
        [record(GAP_BEGIN, "x 5")],
        [record(3, "changed x")],
    ],
)
def test_records_that_cannot_be_are_damage(tmp_path: Path, items: list[Item]) -> None:
    with pytest.raises(DamageError):
        found_in(tmp_path / "j", items)


GAPS = [Gap(50, 60, "changed", 1000, 2000, 9), Gap(90, None, "untracked", 5000, None, 3)]


def test_gaps_are_written_down_once_more_beside_the_intervals(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", BLOCK)])
    keep(store, [])
    assert not (store.path / MARKER).exists(), "without one, nobody looks for records"
    assert kept(store) == []
    announce(store, 40)
    assert kept(store) == []
    keep(store, GAPS[1:])
    keep(store, GAPS[:1])
    before = (store.path / MARKER).stat().st_ino
    keep(store, GAPS[:1])
    announce(store, 99)
    assert (store.path / MARKER).stat().st_ino == before, "nothing new is nothing to write"
    assert kept(store) == GAPS
    assert read_json(store.path / MARKER)["behind"] == 40
    (store.path / MARKER).write_bytes(b"{}")
    with pytest.raises(DamageError):
        kept(store)
    keep(store, GAPS)
    assert kept(store) == GAPS


def test_no_write_inside_is_a_target_and_the_nearest_are_named() -> None:
    for write_number in (49, 60, 61, 89):
        refuse_in_gap(write_number, GAPS)
    for write_number in (50, 55, 59):
        with pytest.raises(TargetError) as told:
            refuse_in_gap(write_number, GAPS)
        assert "--target-write 49" in str(told.value.hint)
        assert "--target-write 60" in str(told.value.hint)
    for write_number in (90, 95):
        with pytest.raises(TargetError, match="not ended") as told:
            refuse_in_gap(write_number, GAPS)
        assert "--target-write 89" in str(told.value.hint)


JOINED = [
    Gap(50, 60, "untracked", 1000, 2000, 9),
    Gap(61, 70, "changed", 1500, 3000, 3),
    Gap(72, None, "changed", 9000, None, 3),
]


def test_where_one_gap_follows_another_at_once_the_first_end_is_no_target() -> None:
    """What is there is a mixture: what was tracked is in, what was changed by somebody else is not."""
    for write_number in (49, 70, 71):
        refuse_in_gap(write_number, JOINED)
    for write_number in (50, 59, 60, 61, 69):
        with pytest.raises(TargetError) as told:
            refuse_in_gap(write_number, JOINED)
        assert "--target-write 49 " in str(told.value.hint)
        assert "--target-write 70 " in str(told.value.hint)
    with pytest.raises(TargetError) as told:
        refuse_time_in_gap(1400, JOINED)
    assert "--target-write 70 " in str(told.value.hint)


def tracked(journal: Path, state: int, behind: int) -> None:
    """The bitmap's file as far as its two slots, as FORMAT.md 1.8 has them."""
    slot = bytearray(BLOCK)
    struct.pack_into("<8sII16sQQQQI", slot, 0, b"PGCDPTRK", 1, state, SET_ID, 7, 1000, behind, 2000, 1)
    struct.pack_into("<Q", slot, 72, xxhash.xxh3_64_intdigest(bytes(slot)))
    (journal / "tracked").write_bytes(bytes(slot) * 2)


@pytest.mark.parametrize("state", [1, 2], ids=["tracking", "healing"])
def test_a_gap_without_its_record_is_told_of(tmp_path: Path, state: int) -> None:
    """Healing is said before the begin record, which may not have come to the journal."""
    tracked(tmp_path, state, 41)
    assert unrecorded_gap(Journal(tmp_path, SET_ID)) == Gap(42, None, "untracked", 1000, None, 0)
    tracked(tmp_path, 0, 41)
    assert unrecorded_gap(Journal(tmp_path, SET_ID)) is None


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([DATA] * 3, [(4, None)]),
        ([BEGIN, END, DATA], [(1, 2), (4, None)]),
        ([DATA, DATA, DATA, UNTRACKED, DATA], [(4, None)]),
        ([DATA, DATA, DATA, UNTRACKED, DATA, record(GAP_END, gap_name("untracked", 1000))], [(4, 6)]),
    ],
    ids=["no record", "another gap before", "begun", "ended, which the bitmap does not say yet"],
)
def test_the_gap_of_the_bitmap_is_there_once(
    tmp_path: Path, items: list[Item], expected: list[tuple[int, int | None]]
) -> None:
    found = found_in(tmp_path / "j", items)
    tracked(tmp_path, 2, 3)
    assert [
        (gap.begin, gap.end) for gap in with_unrecorded(found, unrecorded_gap(Journal(tmp_path, SET_ID)))
    ] == expected


def test_no_time_inside_is_a_target() -> None:
    for moment in (1000, 2000, 5000):
        refuse_time_in_gap(moment, GAPS)
    for moment in (1001, 1999, 5001, 10**18):
        with pytest.raises(TargetError, match="lies in a gap"):
            refuse_time_in_gap(moment, GAPS)
