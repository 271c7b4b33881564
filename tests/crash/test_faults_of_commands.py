"""Each place at which a command makes bytes durable fails once: production is whole, and what the error names mends it.

Without another word said: every fourth place; with --soak each of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pgcdp import api
from pgcdp import config as settings
from pgcdp.capture import attach, protect
from pgcdp.errors import PgcdpError
from pgcdp.sets import list_sets, set_paths
from tests.cluster.test_growing import NOISE, assert_grown
from tests.crash.test_kill_rewind import make, make_targets, rows, step_of
from tests.faults.points import python_points
from tests.faults.service import Faults
from tests.fix_engine import MIB, _plain_program
from tests.fix_house import House, assert_as_before
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.results import keep_result

SOME = pytest.mark.parametrize(
    "every",
    [pytest.param(4, id="some"), pytest.param(1, id="each", marks=[pytest.mark.soak, pytest.mark.timeout(3600)])],
)
PUTTING_BACK = "capture.protect._put_back."
LEADS_THERE = "capture.protect._switch_to_volumes.fsync"
"""Putting back is come by only after another place has failed, when the old directories have stepped aside."""


@pytest.fixture
def engine_program() -> Path:
    """What fails here is Python's: one build of the engine is enough."""
    return _plain_program()


def points(every: int, *rooms: str) -> list[str]:
    return sorted(name for name in python_points() if name.startswith(rooms))[::every]


class Round:
    """A place that fails once, in whichever of several commands comes by it first."""

    def __init__(self, failing: Faults, point: str) -> None:
        self.failing, self.point = failing, point

    def run(self, command: Callable[[], object]) -> str | None:
        """What the error of a command says is to be done; None when there was none, "" when it says nothing.

        Raises an error that has nothing to do with the place.
        """
        try:
            command()
        except PgcdpError as error:
            if not self.came:
                raise
            return error.hint or ""
        return None

    @property
    def came(self) -> bool:
        return bool(self.failing.fired(self.point))


def each(failing: Faults, every: int, *rooms: str) -> list[str]:
    """Names, for the loop of a test; nothing fails behind it."""
    failing.clear_all()
    return points(every, *rooms)


def assert_whole(found: ProtectedSet) -> None:
    """A boundary can be cut, and what it gives back is what the volume has."""
    found.wait_following()
    api.cut(found.name)
    api.down(found.name)
    found.assert_volume_is_newest()
    found.up()


@SOME
def test_of_a_rewind(make_set: MakeSet, binaries_of: BindirOf, failing: Faults, every: int) -> None:
    found = make(make_set, binaries_of(15))
    targets = make_targets(found)
    came = []
    for number, point in enumerate(each(failing, every, "rewinding.", "recovery.rewind.", "postgres.timelines.")):
        goal, here = list(targets)[number % 2], rows(found)
        failing.set(point, "eio")
        once = Round(failing, point)
        hint = once.run(lambda to=goal: api.rewind(found.name, targets[to], agree=lambda told: None, prove=False))  # type: ignore[misc]
        failing.clear(point)
        if hint is not None and step_of(found) is not None:
            assert f"pgcdp up {found.name}" in hint, point
        found.up()
        found.wait_following()
        assert step_of(found) is None
        assert rows(found) in (here, goal), point
        if rows(found) != goal:
            api.rewind(found.name, targets[goal], agree=lambda told: None, prove=False)
            assert rows(found) == goal
        came += [point] if once.came else []
    assert came
    found.amcheck()
    keep_result("faults-of-rewind", {"came": came})


@SOME
def test_of_growing(make_set: MakeSet, binaries_of: BindirOf, failing: Faults, every: int) -> None:
    found = make_set(binaries_of(15), fs="xfs", size=304 * MIB, allowed=[*KILLED, *NOISE])
    found.sql("create table t as select generate_series(1, 10000)")
    size, came = 304 * MIB, []
    for point in each(failing, every, "growing.", "config.save_config.", "capture.held._note."):
        size += 16 * MIB
        failing.set(point, "eio")
        once = Round(failing, point)
        hint = once.run(lambda to=size: api.grow(found.name, to))  # type: ignore[misc]
        failing.clear(point)
        if hint is not None:
            assert f"pgcdp grow {found.name} again" in hint, point
            assert found.sql("select count(*) from t") == [(10000,)]
            api.grow(found.name, size)
        assert_grown(found, size)
        came += [point] if once.came else []
    assert_whole(found)
    assert came
    keep_result("faults-of-growing", {"came": came})


@SOME
def test_of_down_and_up(make_set: MakeSet, binaries_of: BindirOf, failing: Faults, every: int) -> None:
    found = make_set(binaries_of(15), size=384 * MIB, allowed=[*KILLED])
    found.sql("create table t as select generate_series(1, 10000)")
    came = []
    for point in each(failing, every, "capture.fingerprint.", "capture.held."):
        failing.set(point, "eio")
        once = Round(failing, point)
        for verb, command in (("down", api.down), ("up", api.up)):
            hint = once.run(lambda it=command: it(found.name))  # type: ignore[misc]
            if hint is not None:
                assert f"pgcdp {verb} {found.name} again" in hint, point
                command(found.name)
        failing.clear(point)
        assert found.sql("select count(*) from t") == [(10000,)], point
        came += [point] if once.came else []
    assert_whole(found)
    assert came
    keep_result("faults-of-down", {"came": came})


@SOME
def test_of_protect_and_unprotect(house: House, failing: Faults, every: int) -> None:
    paths, came = set_paths("main"), []
    for point in each(
        failing, every, "capture.protect.", "capture.copying.", "capture.held.", "capture.home.", "config."
    ):
        failing.set(point, "eio")
        if point.startswith(PUTTING_BACK):
            failing.set(LEADS_THERE, "eio")
        once = Round(failing, point)
        for verb, command in (("protect", lambda: protect.protect(house.request())), ("unprotect", taken_out)):
            wanted = ["main"] if verb == "protect" else []
            hint = once.run(command) if not once.came else (command(), None)[1]
            if hint is not None and paths.protect_state.exists():
                assert f"pgcdp {verb} main again" in hint, point
            elif hint is not None and verb == "protect":
                assert_as_before(house)
            protect.recover("main")  # what the same command does first
            assert house.count() == 1000, point
            if list_sets() != wanted:
                command()
            assert list_sets() == wanted
            assert house.count() == 1000, point
            if verb == "protect":
                assert attach.is_attached(settings.load_config("main"))
        failing.clear_all()
        assert_as_before(house)
        shutil.rmtree(house.root / "store", ignore_errors=True)
        came += [point] if once.came else []
    assert came
    keep_result("faults-of-protect", {"came": came})


def taken_out() -> None:
    protect.unprotect(settings.load_config("main"))
