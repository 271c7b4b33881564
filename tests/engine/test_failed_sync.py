"""A volume's sync fails, and the disk falls back to what it had: nobody may read that, it is written again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgcdp.records import Volume
from pgcdp.store.layout import Store
from tests.faults.service import Faults
from tests.fix_engine import BLOCK, MIB, Capture, Direct
from tests.follower import Follower
from tests.model import read_journal, replay
from tests.raw_workload import Workload
from tests.stage_history import VOLUMES
from tests.waiting import pass_time, wait_until

MANY = 60
"""Reads at one time: more than there are buffers for."""
LAST = MANY - 1


@pytest.fixture
def capture(faulty_engine: Path, faults: Faults, scratch: Path) -> Iterator[Capture]:
    """Started, with fault points."""
    made = Capture(faulty_engine, scratch / "faulty", {"data": 8 * MIB})
    made.start()
    yield made
    made.kill()


def fall_back(capture: Capture, faults: Faults) -> None:
    """Some blocks were 1 and synced, then 2 and applied; the last of them are 1 again, and cannot be written."""
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"1" * BLOCK * MANY)
        assert "error" not in capture.request("sync")
        volume.write(0, b"2" * BLOCK * MANY)
    wait_until(lambda: capture.status()["unapplied_bytes"] == 0, what="it is on the volume")
    faults.set("volume.replay.write", "eio", times=0)  # half of them are
    faults.set("volume.sync", "lost")
    wait_until(lambda: faults.fired("volume.sync"), what="the failed sync")
    wait_until(lambda: faults.fired("volume.replay.write"), what="the first try to write it again")
    assert capture.backing("data").read_bytes()[LAST * BLOCK :][:BLOCK] == b"1" * BLOCK, "nothing was lost"


def wait_fired(faults: Faults, point: str) -> None:
    """It has failed."""
    wait_until(lambda: faults.fired(point), what=point)


def follower_of(capture: Capture) -> Follower:
    """An agent with a fresh store."""
    store = capture.root / "store"
    volumes = [Volume(i, each, size) for i, (each, size) in enumerate(capture.volumes.items())]
    Store.create(store, "raw", bytes.fromhex(capture.set_id), volumes)
    spec: dict[str, object] = {
        "store": str(store), "control": str(capture.socket), "journal": str(capture.journal), "mode": "optimal",
        "set_id": capture.set_id, "backings": [str(capture.backing(each)) for each in capture.volumes],
        "control_device": str(capture.device("control")),
    }  # fmt: skip
    return Follower(spec)


class Reads:
    """One thread for each block, from the last one on."""

    def __init__(self, capture: Capture, count: int) -> None:
        self.found: dict[int, bytes | OSError] = {}
        self._threads = [
            threading.Thread(target=self._read, args=(capture, each), daemon=True) for each in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, capture: Capture, block: int) -> None:
        try:
            with Direct(capture.device("data")) as volume:
                self.found[block] = volume.read((LAST - block) * BLOCK, BLOCK)
        except OSError as error:
            self.found[block] = error

    def end(self) -> None:
        """All are answered."""
        for thread in self._threads:
            thread.join(30)
        assert len(self.found) == len(self._threads), "reads wait for ever"


def assert_equal_to_journal(capture: Capture) -> None:
    """Volume = baseline + journal."""
    assert "error" not in capture.request("sync")
    writes = read_journal(capture.journal).writes
    expected = replay([capture.baseline("data").read_bytes()], writes, writes[-1].number)[0]
    assert capture.backing("data").read_bytes() == expected


@pytest.mark.parametrize("count", [1, MANY])
def test_no_read_gets_what_the_disk_fell_back_to(capture: Capture, faults: Faults, count: int) -> None:
    fall_back(capture, faults)
    reads = Reads(capture, count)
    wait_until(lambda: capture.status()["reads"] >= count, what="the reads come")
    pass_time(1.5)  # another try to write it again lies in it
    assert reads.found == {}, "a read was answered while the volume lacks what it had"
    status = capture.status()
    assert status["state"] == "stalled"
    assert "sync failed" in status["errors"][0]
    assert status["synced_write"] < status["applied_write"]
    faults.clear("volume.replay.write")
    reads.end()
    assert set(reads.found.values()) == {b"2" * BLOCK}
    wait_until(lambda: capture.status()["errors"] == [], what="it is written again")
    assert capture.status()["state"] == "capturing"
    assert_equal_to_journal(capture)
    assert capture.stop() == 0


def test_blocks_in_memory_are_read_and_come_behind_what_is_written_again(capture: Capture, faults: Faults) -> None:
    fall_back(capture, faults)
    with Direct(capture.device("data")) as volume:
        volume.write(LAST * BLOCK, b"3" * BLOCK)
        assert volume.read(LAST * BLOCK, BLOCK) == b"3" * BLOCK
        faults.clear("volume.replay.write")
        assert volume.read((LAST - 1) * BLOCK, BLOCK) == b"2" * BLOCK
        wait_until(lambda: capture.status()["unapplied_bytes"] == 0, what="it is on the volume")
        assert volume.read(LAST * BLOCK, BLOCK) == b"3" * BLOCK
    assert_equal_to_journal(capture)


def test_a_sync_asked_for_waits_for_the_first_try_and_says_when_it_failed(capture: Capture, faults: Faults) -> None:
    fall_back(capture, faults)
    error = capture.request("sync")["error"]
    assert "sync failed" in error["message"]
    faults.clear("volume.replay.write")
    wait_until(lambda: "error" not in capture.request("sync"), what="it is written again")
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"4" * BLOCK)
    faults.set("volume.sync", "lost")
    assert "error" not in capture.request("sync"), "the sync failed, but all was written again at once"
    assert faults.fired("volume.sync")
    assert_equal_to_journal(capture)


def test_a_process_that_dies_before_it_wrote_it_again_leaves_that_to_the_next(capture: Capture, faults: Faults) -> None:
    fall_back(capture, faults)
    capture.kill()
    faults.clear_all()
    capture.start()
    with Direct(capture.device("data")) as volume:
        assert volume.read(LAST * BLOCK, BLOCK) == b"2" * BLOCK
    assert_equal_to_journal(capture)


def test_a_sync_that_fails_with_nothing_to_lose_keeps_no_read_waiting(capture: Capture, faults: Faults) -> None:
    with Direct(capture.device("data")) as volume:
        for _ in range(4):  # more than a segment
            for at in range(0, 4 * MIB, MIB):
                volume.write(at, b"1" * MIB)
        assert "error" not in capture.request("sync")
        faults.set("volume.replay.sync", "eio", times=0)
        faults.set("volume.sync", "eio", times=2)
        capture.request("release", write=capture.status()["durable_write"])  # for the mark that gives a segment free
        wait_until(lambda: any("sync failed" in each for each in capture.status()["errors"]), what="the failed sync")
        assert volume.read(0, BLOCK) == b"1" * BLOCK
        assert capture.status()["state"] == "capturing"
    wait_until(lambda: capture.status()["errors"] == [], what="the next sync")
    assert not faults.fired("volume.replay.sync")


def test_a_baseline_that_copies_what_the_disk_fell_back_to_is_right(
    faulty_engine: Path, faults: Faults, scratch: Path
) -> None:
    capture = Capture(faulty_engine, scratch / "followed", VOLUMES)
    capture.start()
    follower = follower_of(capture)
    fall_back(capture, faults)
    stages = follower.open()
    assert stages.baseline is not None
    status = follower.engine.status()
    stages.baseline_step(status.synced_write, 0)  # nothing is copied yet: what it goes through here is on the volume
    while not stages.baseline.complete:
        stages.baseline_step(status.synced_write)
    faults.clear("volume.replay.write")
    wait_until(lambda: capture.status()["errors"] == [], what="it is written again")
    stages.baseline_step(follower.engine.status().synced_write)
    stages.baseline_copied(follower.engine.status().durable_write, 0)
    while stages.baseline is not None:
        follower.checkpoint()
        stages.finish_baseline(follower.engine.status().durable_write)
    assert "error" not in capture.request("sync")
    stages.close()
    image = follower.path / "image" / "data.img"
    assert image.read_bytes() == capture.backing("data").read_bytes()
    capture.kill()


def test_what_failed_syncs_lose_under_load_is_written_again(capture: Capture, faults: Faults) -> None:
    """Again and again, also while it is being written again."""
    work = Workload([capture.device("data")], seed=4, max_blocks=16, pause=0.003, reads_back=False)
    work.start()
    for point in ("volume.sync", "volume.replay.sync", "volume.sync", "volume.replay.write", "volume.sync"):
        faults.set(point, "lost")
        if "replay" in point:
            faults.set("volume.sync", "lost")
        work.wait_answered(work.answered + 300)
        wait_fired(faults, point)
        wait_until(lambda: capture.status()["errors"] == [], what="it is written again")
        with Direct(capture.device("data")) as volume:
            volume.read(0, MIB)
    work.finish()
    assert_equal_to_journal(capture)
    assert capture.stop() == 0
