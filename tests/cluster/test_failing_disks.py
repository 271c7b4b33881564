"""Postgres under load on disks that fail, one after the other and together: no client sees an error, nothing is lost.

Full is really full: the store and the journal lie on small filesystems whose last block is taken. Gone is really gone:
the store's filesystem answers everything with EIO until it is unmounted and mounted again. What a disk does to single
writes and syncs of the journal and of the volume, the fault points of the engine do (tests/faults/fault_points.h).

While it lasts, `status`, `check` and the metrics name the disk, the error and what to type next. When it is over, all
goes on by itself.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.records import Target
from tests.cluster.test_metrics import free_port, listen, samples
from tests.failing_disks import SmallDisk
from tests.faults.rounds import BOUND_SECONDS
from tests.faults.service import Faults
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.results import keep_result
from tests.scratch import scratch_directory
from tests.survivors import Survivors
from tests.waiting import pass_time, wait_until

MIB = 1 << 20
SEGMENT = 8 * MIB
SETTINGS = {"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "32MB", "checkpoint_timeout": "30s"}
NO_ROOM = "no space left on device (error 28)"
NO_DISK = "input/output error (error 5)"
ALLOWED = [
    r"journal: .*(No space left on device|Input/output error)",
    r"journal: segment \d+ is sealed at",
    r"the journal (is full|has space again): writes",
    r"volume data: .*Input/output error",
    r"(a volume's sync failed|the volumes have again)",
    r"(?i)no space left on device",
    r"(?i)input/output error",
    *KILLED,
    r"(has no store\.json|holds no store)",
    r"closing the store: ",
    r"the store is full: ",
    r"checkpoints are occurring too frequently",
    r"canceling statement due to user request",  # the agent gives up on a Postgres that waits for the journal
]


class Truth:
    """A set with clients on it; each method is one failure from its beginning to its end."""

    def __init__(
        self, found: ProtectedSet, load: Survivors, store: SmallDisk, journal: SmallDisk, faults: Faults, port: int
    ) -> None:
        self.found = found
        self.load = load
        self.store = store
        self.journal = journal
        self.faults = faults
        self.port = port
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str) -> None:
        """One failure; when it is over all is as before, and no client has seen it."""
        began = time.monotonic()
        errors = len(self.load.errors)
        said = getattr(self, name)()
        seconds = self._all_is_well()
        assert self.load.errors[errors:] == [], name
        self.rows.append(
            {"failure": name, "said": said, "well after": seconds, "seconds": round(time.monotonic() - began, 1)}
        )

    # --- one disk

    def store_full(self) -> str:
        """Capture goes on, intervals wait, the lag is shown."""
        self.store.fill()
        said = self._said(str(self.store.place), NO_ROOM)
        self._capture_goes_on()
        assert NO_ROOM in self._failed("agent")
        assert "make room there" in self._hint("agent")
        assert str(self.found.store) in self._failed("store space")
        self.store.empty()
        return said

    def store_gone(self) -> str:
        """As a disk whose controller has failed; then as a mount that is missing, into which nothing is written."""
        self.store.die()
        said = self._said(str(self.store.place), NO_DISK)
        self._capture_goes_on()
        assert NO_DISK in self._failed("agent")
        assert "whether its disk works" in self._hint("agent")
        self.load.pause()  # else a journal of this size may be full by the time that the agent says it
        self.store.leave()
        gone = self._said(str(self.found.store), "holds no store", "bring the store's disk back")
        self.load.resume()
        self._capture_goes_on()
        assert list(self.store.place.iterdir()) == [], "something was written where the store is not"
        self.store.come_back()
        return f"{said}; {gone}"

    def journal_full(self) -> str:
        """With the store full too, so that no segment becomes free: `stall`, and beforehand how long until then.

        What it has made already it uses again: after a long lag that can be all that it may have.
        """
        self.journal.fill()
        self.store.fill()
        before = api.status(self.found.name)
        room = before["until_full"]["journal"]["room"]
        assert room <= before["journal"]["limit"] - before["journal"]["bytes"]
        said = self._stalls()
        assert api.status(self.found.name)["until_full"]["journal"]["room"] < SEGMENT
        made = [each for pattern in ("*.seg", "free-*") for each in (self.journal.place / "main").glob(pattern)]
        if len(made) < before["journal"]["limit"] // SEGMENT:
            said = self._stalls("journal", "segment", "No space left on device")
            assert "free space there" in self._hint("journal space")
        self._said(str(self.store.place), NO_ROOM)
        self.journal.empty()
        self.store.empty()
        self._writes_go_on()
        return said

    def journal_fails(self) -> str:
        """Nothing that is written to it becomes durable."""
        self.faults.set("journal", "eio", times=0)
        said = self._stalls("journal", "Input/output error")
        self.faults.clear("journal")
        self._writes_go_on()
        return said

    def volume_fails(self) -> str:
        """Production runs on for as much as memory and journal hold, then writes wait. Its syncs have failed too."""
        self.faults.set("volume", "eio", times=0)
        said = self._said("volume data", "Input/output error", agent=False)
        before = self.load.acknowledged()
        self._stalls("volume data", "Input/output error", answered=True)
        wait_until(lambda: not self._answered_in_a_second(), timeout=240, what="memory is full, and writes wait")
        assert self.load.acknowledged() > before, "what is durable in the journal is answered"
        self.faults.clear("volume")
        self._writes_go_on()
        return said

    def failed_sync(self) -> str:
        """What the disk lost is written again from the journal, which fails for a while as well.

        Each sync fails until one had something to lose: one that comes for the mark alone may have had nothing.
        """
        self.faults.set("volume.replay.sync", "lost", times=0)
        self.faults.set("volume.sync", "lost", times=0)
        said = self._said("sync failed", agent=False)
        synced = self.found.engine.status().synced_write
        said = self._stalls("sync failed", "cannot be written again", answered=True)
        assert "dmesg" in self._hint("capture")
        assert self.found.engine.status().synced_write == synced, "nothing is taken for applied"
        self.faults.clear("volume.sync")
        self.faults.clear("volume.replay.sync")
        self._writes_go_on()
        return said

    # --- together

    def all_together(self) -> str:
        """Store gone, journal and volume failing, all at once."""
        self.store.die()
        for disk in ("journal", "volume"):
            self.faults.set(disk, "eio", times=0)
        said = self._stalls("journal", "Input/output error")
        self._said(str(self.store.place), NO_DISK)
        self.faults.clear_all()
        self.store.come_back()
        self._writes_go_on()
        return said

    # --- what must hold

    def _said(self, *words: str, agent: bool = True) -> str:
        """What `status` says is wrong, as soon as it holds all of `words`."""
        said = ""

        def told() -> bool:
            nonlocal said
            status = api.status(self.found.name)
            told_by = status["agent"] or {}
            said = f"{told_by.get('error')} ({told_by.get('hint')})" if agent else (status["error"] or "")
            return all(word in said and word in status["error"] for word in words)

        try:
            wait_until(told, timeout=60, what=f"status says {words}")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {said!r}") from None
        wait_until(lambda: samples(self.port)["pgcdp_problems", ""] >= 1, timeout=15, what="the metrics count it")
        return said

    def _capture_goes_on(self) -> None:
        """Without the store: commits are answered, nothing of them is stored, the lag grows."""
        before = api.status(self.found.name)
        try:
            self.load.wait_for(200)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {before}, then {api.status(self.found.name)}") from None
        pass_time(1.0)
        after = api.status(self.found.name)
        assert after["state"] == "capturing"
        assert after["durable_write"] > before["durable_write"]
        assert after["stored_write"] == before["stored_write"]
        assert after["lag_seconds"] > before["lag_seconds"] > 0
        now = samples(self.port)
        assert now["pgcdp_state", "capturing"] == 1
        assert now["pgcdp_lag_seconds", ""] > before["lag_seconds"]

    def _stalls(self, *words: str, answered: bool = False) -> str:
        """Writes wait, and `status`, `check` and the metrics say so. `answered`: only reads of the volume wait."""

        def stalled() -> bool:
            status = api.status(self.found.name)
            return status["state"] == "stalled" and all(word in (status["error"] or "") for word in words)

        try:
            wait_until(stalled, timeout=240, what=f"stalled, for {words}")
        except TimeoutError as error:
            raise AssertionError(
                f"{error}: {api.status(self.found.name)}, {self.load.acknowledged()} commits"
            ) from None
        said = str(api.status(self.found.name)["error"])
        failed = self._failed("capture")
        assert all(word in failed for word in words), failed
        assert "writes wait" in failed
        assert self._hint("capture")
        wait_until(lambda: samples(self.port)["pgcdp_state", "stalled"] == 1, timeout=15, what="the metrics say so")
        assert answered or self._answered_in_a_second() <= self.load.clients, "nothing is answered that is not durable"
        return said

    def _answered_in_a_second(self) -> int:
        before = self.load.acknowledged()
        pass_time(1.0)
        return self.load.acknowledged() - before

    def _writes_go_on(self) -> None:
        """Within the bound, by itself."""
        self.load.wait_for(50, BOUND_SECONDS)

    def _all_is_well(self) -> float:
        """Within the bound capture is as it should be, and the store gets all that it had to wait for."""
        began = time.monotonic()
        durable = self.found.engine.status().durable_write  # not a cut: the journal may be full once more, for a moment

        def well() -> bool:
            status = api.status(self.found.name)
            return (
                status["state"] == "capturing"
                and status["error"] is None
                and (status["agent"] or {}).get("taken_write", 0) >= durable
            )

        try:
            wait_until(well, timeout=BOUND_SECONDS + 40, interval=0.1, what="all is well")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {api.status(self.found.name)}") from None
        seconds = time.monotonic() - began
        number = api.cut(self.found.name)["number"]
        assert api.status(self.found.name)["stored_write"] >= durable, number
        self.load.wait_for(50)
        wait_until(lambda: samples(self.port)["pgcdp_problems", ""] == 0, what="no problem in the metrics")
        return round(seconds, 1)

    def _finding(self, name: str) -> dict[str, Any]:
        found = [each for each in api.check(self.found.name)["checks"] if each["name"] == name and not each["ok"]]
        assert found, f"check says nothing of {name}"
        return dict(found[0])

    def _failed(self, name: str) -> str:
        return str(self._finding(name)["detail"])

    def _hint(self, name: str) -> str:
        return str(self._finding(name)["hint"])

    def check(self) -> None:
        """Store and journal make the volume byte for byte; every commit is there, in production and in a verified
        newest point; nothing in the store is damaged."""
        self.load.pause()
        self.load.assert_kept(self.found)
        wrong = [
            each for each in api.check(self.found.name, full=True)["checks"]
            if not each["ok"] and each["name"] in ("store", "journal", "catalog", "scrub", "capture", "agent")
        ]  # fmt: skip
        assert wrong == []
        with self.found.running_at(Target("newest")) as box:
            self.load.assert_kept(box)
        assert api.verify(self.found.name, Target("newest"))["ok"]
        self.found.amcheck()
        api.down(self.found.name)
        self.found.assert_volume_is_newest()
        self.found.up()
        self.found.wait_following()
        assert self.found.sql("select 1") == [(1,)]
        self.load.resume()


MakeTruth = Callable[..., Any]


@pytest.fixture
def small_disks() -> Iterator[Callable[[str, int, str], SmallDisk]]:
    """small_disks(name, size, fs)"""
    root = scratch_directory("disks")
    made: list[SmallDisk] = []

    def make(name: str, size: int, fs: str) -> SmallDisk:
        made.append(SmallDisk(root, name, size, fs))
        return made[-1]

    yield make
    for disk in made:
        disk.end()
    shutil.rmtree(root)


@pytest.fixture
def make_truth(
    faults: Faults, faulty_engine: Path, small_disks: Callable[[str, int, str], SmallDisk], make_set: MakeSet,
    binaries_of: BindirOf, monkeypatch: pytest.MonkeyPatch,
) -> MakeTruth:  # fmt: skip
    """`with make_truth(fs) as truth`: a set whose store and journal lie on filesystems of that kind."""

    @contextmanager
    def make(fs: str, seed: int) -> Iterator[Truth]:
        monkeypatch.setenv("PGCDP_ENGINE", str(faulty_engine))
        store, journal = small_disks("store", 2 << 30, fs), small_disks("journal", 512 * MIB, fs)
        found = make_set(
            binaries_of(15), settings=SETTINGS, allowed=ALLOWED, cut=("2s",), fs=fs, size=512 * MIB,
            journal=journal.place / "main", journal_limit=192 * MIB, segment_size=SEGMENT,
            store_at=store.place / "main",
        )  # fmt: skip
        found.pgbench("-i", "-q", "-s", "2")
        port = free_port()
        listen(found, f"127.0.0.1:{port}")
        with Survivors(found, clients=4, seed=seed) as load:
            load.wait_for(100)
            try:
                yield Truth(found, load, store, journal, faults, port)
            finally:  # clients wait for as long as a disk fails
                faults.clear_all()
                journal.empty()
                store.come_back()
                store.empty()

    return make


ALONE = ("store_full", "store_gone", "journal_full", "journal_fails", "volume_fails", "failed_sync")


def test_each_disk_fails_alone_and_all_of_them_together(make_truth: MakeTruth) -> None:
    with make_truth("ext4", seed=1) as truth:
        for name in (*ALONE, "all_together"):
            truth.run(name)
        truth.check()
        keep_result("failing-disks-short", truth.rows)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_forty_failures_in_any_order(make_truth: MakeTruth, fs: str) -> None:
    chooser = random.Random(7)
    with make_truth(fs, seed=2) as truth:
        for _ in range(4):
            names = [*ALONE, "all_together", *chooser.sample(ALONE, 3)]
            chooser.shuffle(names)
            for name in names:
                truth.run(name)
                keep_result(f"failing-disks-{fs}", truth.rows)
            truth.check()
    assert len(truth.rows) == 40
