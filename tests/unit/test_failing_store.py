"""The store's disk fails while retention and merging work on it: nothing that counts is hurt, the next run ends it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from pgcdp.errors import PgcdpError
from pgcdp.fsio import told
from pgcdp.recovery.expiring import Run, expiring
from pgcdp.recovery.merged import merge_due
from pgcdp.store.rebuild import rebuild
from pgcdp.store.retention import Policy
from pgcdp.store.scrub import check_store
from tests.faults.points import python_points
from tests.faults.service import Faults
from tests.fix_years import AN_HOUR, DROP_ALL, HOURLY, NOW, Years, index
from tests.results import keep_result

A_DAY = [1500] * 6
"""Minutes between boundaries: each is of another day, so that the base moves on."""
WORK = {
    "thin": (Policy(0.0), AN_HOUR), "join": (HOURLY, AN_HOUR), "base": (DROP_ALL, A_DAY),
}  # fmt: skip
"""What retention does: by which policy, and how many minutes lie between the boundaries."""


def history(place: Path, what: str) -> Years:
    """Of six intervals, with what is known of their transactions."""
    years = Years(place, 51, [6] * 6, WORK[what][1])
    for number in range(1, 7):
        index(years.store, number)
    rebuild(years.store)[0].close()
    return years


def work(years: Years, what: str) -> list[str]:
    """One run of it; what it said that it could not do."""
    try:
        with expiring(years.store):
            done = Run(years.store, WORK[what][0]).run(NOW)
    except PgcdpError as error:
        return [error.message]
    except OSError as error:
        return [told(error)]
    return list(done.failed)


def fail_at_each(place: Path, faults: Faults, what: str, kind: str, step: int, times: int = 1) -> list[str]:
    """Every `step`-th change of the store's disk fails, and `times` - 1 behind it, each time in a history of its own.

    Gives the points that did.
    """
    place = place / f"{what}-{kind}-{times}"
    place.mkdir(parents=True)
    undisturbed = history(place / "whole", what)
    assert not work(undisturbed, what)
    remains = undisturbed.source().listing().intervals
    points: list[str] = []
    call = step - 1
    while True:
        years = history(place / str(call), what)
        faults.set("store", kind, skip=call, times=times)
        work(years, what)
        faults.clear("store")
        fired = faults.fired("store")
        if not fired:
            return points
        points += fired
        assert check_store(years.store).ok, fired
        assert not work(years, what), "the disk is well"
        years.assert_sound()
        assert years.source().listing().intervals == remains, fired
        call += step


@pytest.mark.parametrize("what", WORK)
def test_retention_on_a_failing_disk(tmp_path: Path, failing: Faults, what: str) -> None:
    assert len(fail_at_each(tmp_path, failing, what, "enospc", 25)) >= 3


@pytest.mark.soak
def test_retention_with_each_change_failing_once(tmp_path: Path, failing: Faults) -> None:
    """And with the next one failing, too, which is where it is cleared up behind the first."""
    came = {
        point
        for what in WORK
        for kind, times in (("enospc", 1), ("eio", 1), ("lost", 1), ("enospc", 2))
        for point in fail_at_each(tmp_path, failing, what, kind, 1, times)
    }
    ours = ("recovery.joining", "recovery.expiring", "recovery.sweeping.sweep", "store.thinning", "store.base")
    missed = sorted(point for point in python_points() - came if point.startswith(ours))
    keep_result("faults-of-retention", {"points": sorted(came), "never reached": missed})
    assert missed == []


@pytest.mark.parametrize("kind", ["enospc", "eio", "lost"])
def test_merging_on_a_failing_disk(tmp_path: Path, failing: Faults, kind: str) -> None:
    """What is merged is expendable: it is made anew, and what was half made is never read."""
    for call in range(0, 60, 3):
        years = Years(tmp_path / f"{kind}{call}", 53, [2] * 18, [5] * 18)
        failing.set("store", kind, skip=call)
        with suppress(OSError):
            merge_due(years.store, lambda: False)
        failing.clear("store")
        if not failing.fired("store"):
            assert call >= 6
            return
        years.assert_only(set(range(1, len(years.world.ops) + 1)))
        assert merge_due(years.store, lambda: False) >= 0
        years.assert_only(set(range(1, len(years.world.ops) + 1)))
