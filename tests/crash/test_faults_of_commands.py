"""Each place at which a command makes bytes durable fails once: production is whole, and what the error names mends it.

Without another word said: every fourth place; with --soak each of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pgcdp import api, extending, healing, remaking
from pgcdp import config as settings
from pgcdp.capture import attach, protect
from pgcdp.capture.planning import Backing
from pgcdp.capture.volumes import mount_at
from pgcdp.errors import PgcdpError
from pgcdp.records import Target
from pgcdp.recovery.source import Source
from pgcdp.sets import list_sets, set_paths
from tests.cluster.test_changed_volumes import mounted_plain
from tests.cluster.test_extending import WHILE_DOWN
from tests.cluster.test_growing import NOISE, assert_grown
from tests.cluster.test_lost_journal import LOST
from tests.cluster.test_outside import new_space
from tests.crash.test_kill_rewind import START, make, make_targets, rows, step_of
from tests.faults.points import python_points
from tests.faults.service import Faults
from tests.fix_disks import MakeDisk
from tests.fix_engine import MIB, _plain_program
from tests.fix_house import House, assert_as_before
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet, first_difference
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
    for point in each(failing, every, "capture.fingerprint.", "capture.held.", "capture.same_parts."):
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
        failing,
        every,
        "capture.protect.",
        "capture.copying.",
        "capture.held.",
        "capture.home.",
        "capture.volumes.",
        "config.",
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


def heal(found: ProtectedSet, failing: Faults, point: str) -> list[str]:
    """`up --heal` with a place that fails once, and what the error names then; the point, if it was come by."""
    failing.set(point, "eio")
    once = Round(failing, point)
    hint = once.run(lambda: api.up(found.name, heal=lambda told: None))
    failing.clear(point)
    if hint is not None:
        assert f"pgcdp up {found.name}" in hint, point
        assert mount_at(found.config.volumes[0].mountpoint) is None, "nothing is mounted before it has ended"
        api.up(found.name, heal=None if healing.pending(found.config.paths) else lambda told: None)
    return [point] if once.came else []


@SOME
def test_of_healing_a_lost_journal(make_set: MakeSet, binaries_of: BindirOf, failing: Faults, every: int) -> None:
    """What only the journal had is one gap; before it begins anew, and behind that, nothing else is mounted."""
    found = make_set(binaries_of(15), size=384 * MIB, allowed=[*KILLED, START, *LOST])
    found.sql("create table t (n int)")
    came = []
    ours = ("healing.", "capture.renewing.", "capture.journal.write_mark.", "capture.same_parts.")
    for number, point in enumerate(each(failing, 2 * every if every > 1 else 1, *ours)):
        found.wait_following()
        api.cut(found.name)
        found.kill_agent()
        found.sql(f"insert into t values ({number})")
        api.down(found.name)
        for segment in found.config.journal.glob("*.seg"):
            segment.unlink()
        gaps = len(Source(found.source().store).gaps())
        came += heal(found, failing, point)
        assert found.sql("select max(n) from t") == [(number,)], point
        found.wait_following()
        assert [gap.reason for gap in found.source().gaps()[gaps:]] == ["lost"], point
    assert_whole(found)
    assert came
    keep_result("faults-of-healing-a-lost-journal", {"came": came})


def changed_while_down(found: ProtectedSet) -> None:
    """Somebody writes to its volume, with nothing of pgcdp attached."""
    (volume,) = found.config.volumes
    with mounted_plain(found, volume) as place:
        (place / "foreign").write_bytes(os.urandom(16 * 4096))


@SOME
def test_of_healing(make_set: MakeSet, binaries_of: BindirOf, failing: Faults, every: int) -> None:
    """What somebody changed is taken in as one gap, whatever failed on the way there."""
    found = make_set(binaries_of(15), size=384 * MIB, allowed=[*KILLED, START])
    found.sql("create table t as select generate_series(1, 10000)")
    came = []
    for point in each(failing, every, "healing.", "store.gaps.announce.", "capture.fingerprint.forget."):
        found.wait_following()
        api.cut(found.name)
        api.down(found.name)
        changed_while_down(found)
        gaps = len(found.source().gaps())
        came += heal(found, failing, point)
        assert found.sql("select count(*) from t") == [(10000,)], point
        found.wait_following()
        assert len(found.source().gaps()) == gaps + 1, point
    assert_whole(found)
    assert came
    keep_result("faults-of-healing", {"came": came})


@SOME
@pytest.mark.parametrize("kind", ["file", "device"])
def test_of_remaking_a_volume(
    make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf, failing: Faults, kind: str, every: int
) -> None:
    """Nothing is captured on a volume that is not whole; the same command makes it so."""
    device = {"wal_volume": make_disk(304 * MIB)} if kind == "device" else {"wal_size": 304 * MIB}
    found = make_set(binaries_of(15), size=384 * MIB, allowed=[*KILLED], **device)
    found.sql("create table t as select generate_series(1, 10000)")
    came = []
    for point in each(failing, every, "remaking.", "capture.volumes.make_image."):
        found.wait_following()
        api.down(found.name)
        wal = found.config.volumes[1].backing
        before = found.root / "before"
        before.write_bytes(wal.read_bytes())
        if kind == "file":
            wal.unlink()
        failing.set(point, "eio")
        once = Round(failing, point)
        hint = once.run(lambda: remaking.remake(found.config, ["wal"], lambda lost: None))
        failing.clear(point)
        if hint is not None and (kind == "device" or not wal.exists()):
            assert f"pgcdp up {found.name} --remake" in hint or "run this again" in hint, point
            if not remaking.resume(found.config, ["wal"]):
                remaking.remake(found.config, ["wal"], lambda lost: None)
        remaking.resume(found.config)
        assert first_difference(wal, before) is None, point
        found.up()
        assert found.sql("select count(*) from t") == [(10000,)], point
        came += [point] if once.came else []
    assert_whole(found)
    assert came
    keep_result(f"faults-of-remaking-a-{kind}", {"came": came})


@SOME
@pytest.mark.timeout(1800)
def test_of_taking_in_a_tablespace(make_set: MakeSet, binaries_of: BindirOf, failing: Faults, every: int) -> None:
    """It is in, or out as before; then the next try takes it in."""
    found = make_set(binaries_of(15), size=384 * MIB, allowed=WHILE_DOWN)
    came = []
    for number, point in enumerate(each(failing, every, "extending.", "capture.copying.")):
        place, _ = new_space(found, f"late{number}")
        volumes = len(found.config.volumes)
        failing.set(point, "eio")
        if point.startswith(("extending._put_back.", "extending._switch_back.")):
            failing.set("extending._switch.fsync", "eio")
        once = Round(failing, point)

        def take_in(name: str = f"late{number}") -> None:
            api.add_tablespaces(found.name, [(name, Backing(None, 64 * MIB))], yes=True)

        hint = once.run(take_in)
        failing.clear_all()
        if hint is not None and extending.pending(found.config.paths) is not None:
            assert f"pgcdp up {found.name}" in hint, point
        found.up()
        found.wait_following()
        if len(found.config.volumes) == volumes:
            assert mount_at(place) is None, point
            assert found.sql(f"select count(*) from in_late{number}") == [(1000,)], point
            take_in()
        assert mount_at(place) is not None, point
        assert found.sql(f"select count(*) from in_late{number}") == [(1000,)], point
        came += [point] if once.came else []
    assert came
    keep_result("faults-of-taking-in", {"came": came})


def all_in(place: Path) -> dict[str, bytes]:
    """What is in a directory, or in a file."""
    if place.is_file():
        return {"": place.read_bytes()}
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@SOME
def test_of_a_restore(make_set: MakeSet, binaries_of: BindirOf, failing: Faults, every: int) -> None:
    """Nothing lies where the restored was to be, or all of it; then the same command makes it."""
    found = make_set(binaries_of(15), size=384 * MIB)
    found.sql("create table t as select generate_series(1, 10000)")
    target, came = Target("boundary", int(api.cut(found.name)["number"])), []

    def restore(to: str, place: Path) -> None:
        if to == "image":
            api.restore(found.name, target, to_image=place)
        else:
            api.restore(found.name, target, to_directory=place)

    whole = {to: found.root / f"whole-{to}" for to in ("image", "directory")}
    for to, place in whole.items():
        restore(to, place)
    for point in each(failing, every, "recovery.restore.", "recovery.places.", "intervals.applying."):
        for to, right in whole.items():
            place = found.root / "restored"
            failing.set(point, "eio")
            once = Round(failing, point)
            hint = once.run(lambda to=to, place=place: restore(to, place))  # type: ignore[misc]
            failing.clear(point)
            left = all_in(place) if place.exists() else {}
            if hint is not None and left != all_in(right):
                assert to == "directory" or not left, point
                restore(to, place)
            assert all_in(place) == all_in(right), (point, to)
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            came += [point] if once.came else []
    assert came
    keep_result("faults-of-a-restore", {"came": came})


def taken_out() -> None:
    protect.unprotect(settings.load_config("main"))
