"""Rounds of faults while the journal cannot grow and changes are tracked: on the way there, meanwhile, and back.

Each round begins with a journal that takes nothing and ends with a set that has healed. No writer is told of an error,
none reads what it did not write. At the end baseline and journal are what the volumes hold.
"""

from __future__ import annotations

import random
from typing import Any

from tests.engine.test_tracking import Keeper, state
from tests.faults.points import engine_points
from tests.faults.service import Faults
from tests.fix_engine import Capture
from tests.model import read_tracked
from tests.raw_workload import Workload
from tests.waiting import pass_time, wait_until

HELD_UP_SECONDS = 60.0


def points_while_tracking() -> list[str]:
    """All that an engine comes by which does not make its bitmap meanwhile."""
    found = [name for name in engine_points() if name.startswith(("tracked.", "volume.tracked."))]
    return sorted(set(found) - set(points_of_a_new_bitmap()))


def points_of_a_new_bitmap() -> list[str]:
    """What is come by at the first start, and when a volume grows; the last one where the directory's sync failed."""
    return sorted([name for name in engine_points() if name.startswith("tracked.new.")] + ["tracked.state.directory"])


class TrackingTruth:
    """One engine with fault points whose journal's disk fails, under load from `load` to `end`."""

    def __init__(self, capture: Capture, faults: Faults, seed: int) -> None:
        self.capture = capture
        self.faults = faults
        self.rng = random.Random(seed)
        self.seed = seed
        self.starts = 0
        self.keeper = Keeper(capture)
        self.work: Workload | None = None

    def load(self) -> None:
        """Small writes, so that each batch marks blocks which were not marked before."""
        self.starts += 1
        paths = [self.capture.device(name) for name in self.capture.volumes]
        self.work = Workload(
            paths, seed=self.seed * 100 + self.starts, first_writer=self.starts * 10, max_blocks=4, pause=0.002
        )
        self.work.start()

    def unload(self, *, killed: bool = False) -> None:
        """The writers end; only a kill may have told them of an error."""
        assert self.work is not None
        self.work.finish()
        assert killed or all(op.answered for op in self.work.ops), "a writer was told of an error"
        self.work = None

    def some_writes(self) -> None:
        """They go on: so many are answered."""
        assert self.work is not None
        self.work.wait_answered(self.work.answered + self.rng.randrange(1, 100), timeout=HELD_UP_SECONDS)

    def round(self, point: str, kind: str) -> dict[str, Any]:
        """One fault; the row says whether it came."""
        rng = self.rng
        times, kill = rng.choice([1, 3, 0]), rng.random() < 0.3
        skip = rng.choice([0, 0, 1, 3]) if times else 0
        early = rng.random() < 0.7
        self.faults.set("journal.batch.sync", "eio", times=0)
        if early:
            self.faults.set(point, kind, skip=skip, times=times, milliseconds=300)
            if times:
                self._await_tracking()
            else:
                self._lasts(point, kind)
        self._await_tracking()
        if not early:  # on the way back, at the latest
            self.faults.set(point, kind, skip=skip, times=times or 1, milliseconds=300)
        self.some_writes()
        if kill:
            self._kill()
        self.faults.clear("journal.batch.sync")
        self._heal()
        self.faults.clear(point)
        return {"point": point, "kind": kind, "early": early, "killed": kill, "fired": len(self.faults.fired(point))}

    def _await_tracking(self) -> None:
        wait_until(lambda: state(self.capture) == "tracking", timeout=HELD_UP_SECONDS, what="tracking")

    def _lasts(self, point: str, kind: str) -> None:
        """While it lasts nothing is answered that is not where it must be, and why is said; then it goes on."""
        wait_until(lambda: self.faults.fired(point), timeout=HELD_UP_SECONDS, what=point)
        if kind not in ("slow", "short"):
            number = "No space left" if kind == "enospc" else "Input/output error"
            what = "volume " if point.startswith("volume") else "bitmap of changed blocks"

            def told() -> bool:
                status = self.capture.status()
                said = [each for each in status["errors"] if what in each and number in each]
                return bool(said) and status["state"] == "stalled"

            wait_until(told, timeout=HELD_UP_SECONDS, what=f"a word of {point} {kind}")
        pass_time(self.rng.random())
        self.faults.clear(point)

    def _kill(self) -> None:
        """What is noted has every block that the journal lacks."""
        self.capture.kill()
        self.unload(killed=True)
        self.faults.clear_all()
        noted = read_tracked(self.capture.journal / "tracked")
        assert noted.state != 0, "a gap that nobody knows of"
        self.capture.start()
        self.load()

    def _heal(self) -> None:
        """As the agent does it."""

        def healed() -> bool:
            self.keeper.take_some()
            status = self.capture.status()
            if status["tracked"] and not status["tracked"]["healing"]:
                self.capture.request("heal")
            return bool(status["state"] == "capturing" and not status["errors"])

        wait_until(healed, timeout=HELD_UP_SECONDS, what="healing")
        self.some_writes()
