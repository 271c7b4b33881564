"""Faults at random points and moments under load, one after the other, and what must hold after each and at the end.

    with under_load(...) as truth:
        rows = truth.rounds(20)
    truth.check()

Each round: a fault comes, for once, some times or until it is taken away. Engine and service must say what is wrong
while it lasts; nothing may hang longer than BOUND_SECONDS once it is over, writing
not longer than WRITING_SECONDS; no writer is told of an error. At the end
the model reads the store: every answered write is there, once and in order; volumes, image and increments agree.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from tests.faults.points import engine_points, python_points
from tests.faults.service import Faults, ServiceProcess
from tests.fix_engine import Capture
from tests.model import put_extents, read_store, replay
from tests.raw_workload import Op, Workload, assert_history
from tests.stage_history import VOLUMES
from tests.waiting import pass_time, wait_until

BOUND_SECONDS = 20.0
WRITING_SECONDS = 5.0
"""docs/operations.md: how long after a disk is well again everything goes on, at most."""
REACHED_SECONDS = 4.0
"""How long a fault may wait for its place to be come by, which may not be come by at all."""
SURELY_SECONDS = 60.0
"""How long one that a test names, on a machine that is busy with something else."""
DISKS = ("journal", "volume", "store")
AT_A_START = ("journal.open", "journal.replay", "volume.replay", "journal.mark.directory")
NOT_HERE = ("clone", "journal.recycle.unlink", "journal.leftover", "tracked", "volume.tracked")
"""Of other programs; what only another size of segments leads to, or only two failures: tests/engine/test_leftovers.py;
what only comes while changes are tracked: tests/faults/tracking.py."""
LEADS = {
    "journal.segment.reserve": "journal.segment.header",
    "journal.segment.fill": "journal.segment.header",
    "journal.segment.sync": "journal.segment.header",
    "journal.segment.unlink": "journal.segment.header",
    "journal.tail.unlink": "journal.batch.sync",
    "journal.tail.directory": "journal.batch.sync",
    "journal.recycle.give_up": "journal.recycle.directory",
}
"""Places that are come by only after another one has failed."""
SILENT = ("journal.segment.unlink", "journal.recycle.give_up", "journal.tail.unlink", "journal.tail.directory")
"""What fails there is said of the place before it, or over as soon as that place is well again."""
OURS = (
    "store.frames.", "store.bundle.", "store.image.", "store.image_files.", "store.open_interval.",
    "store.catalog.Catalog._put", "store.parquet.", "intervals.stages.Stages.", "recovery.merged.", "twice.",
)  # fmt: skip
"""Python points that a service without Postgres comes by."""
SELDOM = (
    "store.frames.FrameWriter.resume.ftruncate", "store.image.Image.write_blocks.punch",
    "store.parquet.write_table.pwrite",
)  # fmt: skip
"""Random rounds hardly come by these: tests/unit/test_seldom_faults.py goes there, and to the last one, which only an
encrypted store has, test_failing_files.py."""
ONCE_A_SET = ("add_volume", ".grow.", "Image.create", ".cut.", "_layers", "Twice.remove")


def points_here() -> list[str]:
    """All that a raw set comes by while it serves."""
    engine = [name for name in engine_points() if not name.startswith((*AT_A_START, *NOT_HERE))]
    python = [
        name
        for name in python_points() - set(SELDOM)
        if name.startswith(OURS) and not any(part in name for part in ONCE_A_SET)
    ]
    return sorted(engine) + sorted(python)


def start_points() -> list[str]:
    """Those of an engine that starts."""
    return sorted(name for name in engine_points() if name.startswith(AT_A_START))


def kinds_of(point: str) -> tuple[str, ...]:
    """What can go wrong there."""
    if point in DISKS:
        return ("enospc", "eio", "slow")
    call = engine_points().get(point) or point.rpartition(".")[2]
    if "sync" in call:
        return ("eio", "lost", "slow")
    if "write" in call and "table" not in call:
        return ("enospc", "eio", "short", "slow")
    return ("enospc", "eio", "slow")


class Truth:
    """One raw set under load whose disks fail."""

    def __init__(self, capture: Capture, service: ServiceProcess, faults: Faults, seed: int) -> None:
        self.capture = capture
        self.service = service
        self.faults = faults
        self.rng = random.Random(seed)
        self.seed = seed
        self.ops: list[Op] = []
        self.starts = 0
        self.work: Workload | None = None

    # --- load

    def load(self) -> Workload:
        """Writers on the volumes, new ones after each start of the engine."""
        self.starts += 1
        paths = [self.capture.device("data"), self.capture.device("wal")]
        self.work = Workload(
            paths, seed=self.seed * 100 + self.starts, first_writer=self.starts * 10, max_blocks=16, pause=0.001
        )
        self.work.start()
        return self.work

    def unload(self) -> None:
        """The writers end; they must not have seen an error, nor read what they had not written."""
        assert self.work is not None
        self.work.finish()
        self.ops += self.work.ops
        assert all(op.answered for op in self.work.ops), "a writer was told of an error"
        self.work = None

    # --- rounds

    def rounds(self, count: int, points: list[str], first: Collection[str] = ()) -> list[dict[str, Any]]:
        """So many faults that came; one row for each. Each point is tried once before one is tried again, `first` those
        that have not come elsewhere, which are waited for longer."""
        rows: list[dict[str, Any]] = []
        order = sorted(self.rng.sample(points, len(points)), key=lambda point: point not in first)
        tried = 0
        while len(rows) < count:
            assert tried < 4 * count + 20, f"most faults never came: {rows}"
            point = order[tried] if tried < len(order) else self.rng.choice(points)
            tried += 1
            patience = SURELY_SECONDS / 2 if point in first and tried <= len(order) else REACHED_SECONDS
            row = self.round(point, self.rng.choice(kinds_of(point)), patience=patience)
            if row["fired"]:
                rows.append(row)
        return rows

    def round(
        self, point: str, kind: str, times: int | None = None, patience: float = SURELY_SECONDS
    ) -> dict[str, Any]:
        """One fault. The row says whether it came, what was said, how long it took until all was well."""
        skip = self.rng.choice([0, 0, 1, 7]) if times is None else 0
        times = self.rng.choice([1, 1, 3, 0]) if times is None else times
        times = 0 if point in DISKS else 1 if point in SILENT else times
        lead = LEADS.get(point)
        self.faults.set(point, kind, skip=0 if lead else skip, times=times, milliseconds=300)
        if lead is not None:
            self.faults.set(lead, "eio", times=4)
        reached = self._comes(point, patience)
        if lead is not None:
            self.faults.clear(lead)
        said: list[str] = []
        if reached and times == 0:
            said = self._lasts(point, kind)
        self.faults.clear(point)
        began = time.monotonic()
        if reached:
            self.goes_on()
        return {
            "point": point, "kind": kind, "times": times, "fired": len(self.faults.fired(point)), "said": said,
            "seconds": round(time.monotonic() - began, 2),
        }  # fmt: skip

    def _comes(self, point: str, patience: float) -> bool:
        try:
            wait_until(lambda: self.faults.fired(point), timeout=patience, what=point)
        except TimeoutError:
            return bool(self.faults.fired(point))
        return True

    def _lasts(self, point: str, kind: str) -> list[str]:
        """While it lasts: who must say something does, and names what it is about."""
        if kind in ("slow", "short"):
            pass_time(self.rng.random())
            return []
        said = ""

        def told() -> bool:
            nonlocal said
            engine = self.capture.status()
            said = "; ".join([*engine["errors"], self.service.ask()["error"] or ""])
            return self._names(point, kind, engine["state"], said)

        wait_until(told, timeout=10, what=f"a word of {point} {kind}")
        pass_time(self.rng.random())
        return [said]

    def _names(self, point: str, kind: str, state: str, said: str) -> bool:
        number = "No space left" if kind == "enospc" else "Input/output error"
        if point.startswith("volume"):
            return ("volume " in said) and number in said
        if point == "journal" or point.startswith("journal.batch"):
            return state == "stalled" and ("batch" in said or "segment" in said) and number in said
        if point.startswith("journal"):
            return number in said
        if ".catalog." in point:
            return "catalog.db" in said
        if point.startswith(("recovery.merged", "wal.")):
            return True  # expendable, and said elsewhere: nothing waits
        return str(self.service.store) in said and number.lower() in said.lower()

    def goes_on(self) -> None:
        """All is well by itself: writing within its bound, and behind that storing."""
        assert self.work is not None
        before, durable, began = self.work.answered, self.capture.status()["durable_write"], time.monotonic()

        def writes() -> bool:
            engine = self.capture.status()
            assert self.work is not None
            return engine["state"] == "capturing" and not engine["errors"] and self.work.answered > before + 20

        def well() -> bool:
            service = self.service.ask()
            assert not (service["error"] or "").startswith("bug"), service["error"]
            return writes() and service["error"] is None and service["taken"] >= durable

        try:
            wait_until(writes, timeout=WRITING_SECONDS, what="writing goes on")
            wait_until(well, timeout=BOUND_SECONDS - (time.monotonic() - began), what="all is well")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.capture.status()} {self.service.ask()}") from None

    def start_round(self, point: str) -> dict[str, Any]:
        """The engine dies, and a fault comes when it starts: it says so and starts when the disk is well."""
        self.unload()  # what came behind the last applied mark is there to be replayed
        self.capture.kill()
        self.faults.set(point, "eio")
        said = ""
        try:
            self.capture.start()
        except RuntimeError as error:
            said = str(error)
            self.capture.unmount()
            self.capture.start()
        fired = len(self.faults.fired(point))
        assert not fired or "unlink" in point or "Input/output error" in said, said
        self.faults.clear(point)
        self.load()
        self.goes_on()
        return {"point": point, "kind": "eio", "fired": fired, "said": [said[-300:]]}

    # --- the end

    def check(self) -> dict[str, int]:
        """Everything is stored, and the model finds every write; numbers of what was compared."""
        self.unload()
        self.service.end(timeout=120)
        self.capture.stop()
        stored = read_store(self.service.store)
        intervals = list(stored.intervals.values())
        writes = [write for interval in intervals for write in interval.writes]
        assert_history(self.ops, [write for write in writes if write.volume != len(VOLUMES) - 1])
        numbers = [write.number for write in writes]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "writes are missing"
        states = stored.image_at_boundary(0)
        for interval in intervals:
            before = [bytearray(volume) for volume in states]
            last = interval.writes[-1].number
            states = replay(states, interval.writes, last)
            forward = [bytearray(volume) for volume in before]
            put_extents(forward, interval.forward_map, interval.data)
            assert forward == states, f"forward increment {interval.writes[0].number}"
            back = [bytearray(volume) for volume in states]
            put_extents(back, interval.backward_map, interval.backward)
            assert back == before, f"backward increment {interval.writes[0].number}"
        assert stored.image() == states, "the image"
        for name, state in list(zip(VOLUMES, states, strict=True))[:-1]:  # the last one may have one checkpoint more
            assert self.capture.backing(name).read_bytes() == state, f"volume {name}"
        return {"writes": len(writes), "operations": len(self.ops), "intervals": len(intervals)}


@contextmanager
def under_load(capture: Capture, faults: Faults, seed: int) -> Iterator[Truth]:
    """A raw set whose baseline is complete, with writers on it."""
    capture.allowed += [
        r"journal: ",
        r"the journal (is full|has space)",
        r"volume \w+: ",
        r"(a volume's sync failed|the volumes have again)",
        r"applied mark",
        r"error:",
    ]
    capture.start()
    with ServiceProcess(capture, seed) as service:
        wait_until(lambda: service.ask()["taken"] > 0, timeout=60, what="the first boundary")
        truth = Truth(capture, service, faults, seed)
        truth.load().wait_answered(50)
        try:
            yield truth
        except BaseException:
            if truth.work is not None:
                truth.work.stop.set()
            capture.kill()  # with nobody to make room in the journal, who writes would wait for ever
            raise
        finally:
            faults.clear_all()
