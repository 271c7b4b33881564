"""The newest recovery point while the journal cannot grow: in front of the gap, and it says so."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pgcdp.capture.journal import Journal
from pgcdp.errors import TargetError
from pgcdp.records import GAP_BEGIN, GAP_END, Gap, Target
from pgcdp.recovery.gaps import newest_before
from pgcdp.recovery.source import Source
from pgcdp.store.gaps import announce, gap_name
from pgcdp.store.layout import Store
from tests.journal_writer import MARK, Op
from tests.unit.test_gaps import tracked
from tests.unit.test_increments import SET_ID, World, boundary, capture, make_world, random_op, run_interval

STORED, LAST = 20, 30
TRACKING, HEALING, IDLE = 1, 2, 0


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Interval 1 with writes 1 to 20; 21 to 30 in the journal, behind which changes are tracked."""
    made = make_world(tmp_path)
    chooser = random.Random(3)
    run_interval(made, 1, "optimal", chooser, STORED)
    made.store = made.store.with_baseline(boundary(0, 0))
    capture(made, [random_op(chooser) for _ in range(LAST - STORED)], chooser)
    made.writer.mark(LAST, STORED, LAST)
    return made


def source(world: World, durable: int | None) -> Source:
    """`durable` None: no engine runs."""
    return Source(Store.open(world.store.path), Journal(world.writer.directory, SET_ID), durable)


def more(world: World, *flags: int) -> None:
    """Writes of kinds that the journal has behind the last one: records of the gap, or others (0)."""
    for each in flags:
        name = gap_name("untracked", 1000).encode()
        world.writer.append([Op(MARK, data=name, flags=each) if each else random_op(random.Random(4))])


def newest(world: World, durable: int | None) -> tuple[int, bool]:
    """The write that it is, and whether it is said that a gap lies behind it."""
    point = source(world, durable).resolve(Target("newest"))
    assert source(world, durable).window()[1].write == point.write, "where the recovery window ends"
    assert point.note is None or "1970-01-01" in point.note, "since when"
    return point.write, point.note is not None


@pytest.mark.parametrize("durable", [LAST, None], ids=["in service", "stopped"])
def test_while_changes_are_tracked_the_newest_point_says_so(world: World, durable: int | None) -> None:
    assert newest(world, durable) == (LAST, False)
    tracked(world.writer.directory, TRACKING, LAST)
    assert newest(world, durable) == (LAST, True)
    tracked(world.writer.directory, IDLE, LAST)
    assert newest(world, durable) == (LAST, False)


def test_the_newest_boundary_may_be_the_last_write_before_it(tmp_path: Path) -> None:
    made = make_world(tmp_path)
    run_interval(made, 1, "optimal", random.Random(3), STORED)
    made.store = made.store.with_baseline(boundary(0, 0))
    tracked(made.writer.directory, TRACKING, STORED)
    assert newest(made, STORED) == (STORED, True)


@pytest.mark.parametrize("state", [TRACKING, HEALING])
def test_a_batch_that_was_never_answered_is_not_the_newest_point(world: World, state: int) -> None:
    """Its sync failed behind the last write, and then changes were tracked: it may be in the journal all the same."""
    more(world, 0, 0)
    tracked(world.writer.directory, state, LAST)
    assert newest(world, None) == (LAST, True)
    with pytest.raises(TargetError, match="lies in a gap"):
        source(world, None).resolve(Target("write", LAST + 1))


@pytest.mark.parametrize("stopped", [False, True])
def test_while_the_set_heals_the_newest_point_lies_before_the_gap(world: World, stopped: bool) -> None:
    announce(world.store, LAST)
    tracked(world.writer.directory, HEALING, LAST)
    more(world, GAP_BEGIN, 0)
    assert newest(world, None if stopped else LAST + 2) == (LAST, True)
    more(world, GAP_END, 0)
    tracked(world.writer.directory, IDLE, LAST)
    assert newest(world, None if stopped else LAST + 4) == (LAST + 4, False)


def test_other_gaps_are_refused_as_ever() -> None:
    """One that `up --heal` takes in ends with that command, which must not be taken for an older state."""
    ended = Gap(50, 60, "untracked", 1000, 2000, 9)
    assert newest_before([]) is None
    assert newest_before([ended]) is None
    assert newest_before([Gap(90, None, "changed", 5000, None, 3)]) is None
    for begin, expected in ((90, 89), (61, 49)):
        found = newest_before([ended, Gap(begin, None, "untracked", 5000, None, 3)])
        assert found is not None
        assert found[0] == expected
