"""The interval that holds a gap is lost: the gap is shown all the same, and no time in it is a target."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pgcdp.errors import TargetError
from pgcdp.intervals.increments import close_interval
from pgcdp.intervals.stages import Stages, StageSettings
from pgcdp.records import GAP_BEGIN, GAP_END, Target
from pgcdp.recovery.make_way import MakeWay
from pgcdp.recovery.source import Source
from pgcdp.store.gaps import MARKER, announce, gap_name
from pgcdp.store.image import Image
from pgcdp.store.rebuild import rebuild
from pgcdp.store.scrub import check_store
from tests.journal_writer import MARK, Op
from tests.stage_history import KeepAll
from tests.unit.test_increments import World, boundary, capture, fill, make_world, random_op, run_interval

NAME = gap_name("changed", 10**18 + 20).encode()


@pytest.fixture(params=["closed", "published"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    """Four intervals of 20 writes; the second has a gap. Write n is of 10**18 + n ns.

    The agent takes the store up as a kill has left it: with the second one closed, or published and nothing more.
    """
    made, chooser = make_world(tmp_path), random.Random(7)
    made.store = made.store.with_baseline(boundary(0, 0))
    run_interval(made, 1, "optimal", chooser, 20)
    announce(made.store, 20)
    begin, end = (Op(MARK, data=NAME, flags=flags) for flags in (GAP_BEGIN, GAP_END))
    ops = [random_op(chooser) for _ in range(18)]
    capture(made, [*ops[:5], begin, *ops[5:12], end, *ops[12:]], chooser)
    opened = fill(made, 2, 40)
    if request.param == "closed":
        opened.set_boundary(boundary(2, 40))
        opened.close()
    else:
        image = Image.open(made.store, writable=True)
        close_interval(made.store, opened, image, boundary(2, 40), {"port": 5432})
        image.close()
    settings = StageSettings(1, (), "optimal", 3)
    Stages.open(
        made.store, made.journal, KeepAll(), settings, make_way=MakeWay(1.0), synced=40, released=40
    ).close()  # fmt: skip
    assert Source(made.store).intervals()[-1].number == 2
    for number in (3, 4):
        run_interval(made, number, "optimal", chooser, 20)
    return made


def damaged(world: World) -> set[Path]:
    return {each.file for each in check_store(world.store, full=False).damages}


def test_a_lost_interval_does_not_hide_its_gap(world: World) -> None:
    whole = Source(world.store)
    (gap,) = whole.gaps()
    assert (gap.begin, gap.end) == (26, 34)
    inside = Target("time", 10**18 + 22)  # nothing tells what was there then, though writes 21 to 25 bear such times
    with pytest.raises(TargetError, match="lies in a gap") as told:
        whole.resolve(inside)
    assert damaged(world) == set()
    manifest = world.store.interval(2) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    lost = Source(world.store)
    assert lost.gaps() == [gap]
    with pytest.raises(TargetError) as again:
        lost.resolve(inside)
    assert again.value.message == told.value.message
    assert damaged(world) == {manifest}


def test_a_second_copy_that_lacks_a_gap_is_told_of_and_made_anew(world: World) -> None:
    (gap,) = Source(world.store).gaps()
    copy = world.store.path / MARKER
    for spoil in (lambda: copy.write_bytes(copy.read_bytes()[:-40]), copy.unlink):
        spoil()
        assert Source(world.store).gaps() == [gap], "of the intervals themselves"
        assert damaged(world) == {copy}
        rebuild(world.store)[0].close()
        assert damaged(world) == set()
