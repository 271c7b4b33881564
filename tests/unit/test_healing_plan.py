"""How a set goes on without its journal, by what the store ends with: in a rewind, in a gap, behind the journal."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pgcdp.config import Config
from pgcdp.errors import PreconditionError
from pgcdp.healing import Pending, _anew
from pgcdp.records import GAP_BEGIN, REWIND_BEGIN
from pgcdp.recovery.source import Source
from pgcdp.store.gaps import announce, gap_name
from pgcdp.store.layout import TIMELINES
from tests.journal_writer import MARK, Op
from tests.unit.test_increments import World, boundary, capture, fill, make_world, random_op, run_interval


def world_that_ends_with(place: Path, *ops: Op) -> World:
    """An interval of 20 writes, and behind it five more and these, which are in the open one."""
    made, chooser = make_world(place), random.Random(7)
    made.store = made.store.with_baseline(boundary(0, 0))
    run_interval(made, 1, "optimal", chooser, 20)
    announce(made.store, 20)
    (made.store.path / TIMELINES).mkdir()
    capture(made, [*(random_op(chooser) for _ in range(5)), *ops], chooser)
    opened = fill(made, 2, 25 + len(ops))
    opened.sync()
    opened.close()
    return made


def plan(world: World, durable: int) -> Pending:
    config = cast(Config, SimpleNamespace(journal=Path("/journal"), store=world.store.path))
    return _anew(config, Source(world.store), durable)


def test_it_goes_on_behind_the_stores_newest_write(tmp_path: Path) -> None:
    assert plan(world_that_ends_with(tmp_path), 40) == Pending(10**18 + 25, "lost", 25)


def test_a_gap_that_the_store_has_begun_ends(tmp_path: Path) -> None:
    """A second one inside of it would never be told apart from it, and the first one never end."""
    begun = Op(MARK, data=gap_name("untracked", 777).encode(), flags=GAP_BEGIN)
    assert plan(world_that_ends_with(tmp_path, begun), 40) == Pending(777, "untracked", 26)


def test_not_inside_a_rewind(tmp_path: Path) -> None:
    """Its end record was in the journal: without it, all behind its begin would be refused for ever."""
    world = world_that_ends_with(tmp_path, Op(MARK, data=b"12", flags=REWIND_BEGIN))
    with pytest.raises(PreconditionError, match="had the end of the rewind in place that begins with write 26") as told:
        plan(world, 40)
    assert "--target-write 25" in str(told.value.hint)


def test_not_behind_a_mark_that_is_older_than_the_store(tmp_path: Path) -> None:
    """An old copy of the journal says of another stop that it was in order."""
    with pytest.raises(PreconditionError, match="ended with write 24, and the store has write 25: it is an older copy"):
        plan(world_that_ends_with(tmp_path), 24)


def test_a_volume_that_came_with_a_lost_write_is_in_the_gap(tmp_path: Path) -> None:
    store = world_that_ends_with(tmp_path).store
    store.extra.update(mountpoints={"data": "/d"}, filesystems={"data": "xfs"})
    store = store.mounted("data", Path("/d"), "xfs", 31)
    assert store.since_at_most(26).since == {"data": 26}
    assert store.since_at_most(40).since == {"data": 31}
