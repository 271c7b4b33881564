"""Disks of journal, volumes and store fail anywhere, at random moments, under load: never a wrong byte, never a hang.

What is compared: tests/faults/rounds.py. How disks are made to fail: tests/faults/fault_points.h and sitecustomize.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.faults.rounds import DISKS, points_here, start_points, under_load
from tests.faults.service import Faults
from tests.fix_engine import MIB, Capture, Direct, MakeCapture
from tests.model import read_journal
from tests.results import keep_result
from tests.stage_history import VOLUMES
from tests.waiting import wait_until


@pytest.fixture
def engine_program(faulty_engine: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each engine here has fault points."""
    monkeypatch.setenv("PGCDP_ENGINE", str(faulty_engine))
    return faulty_engine


def a_set(make_capture: MakeCapture) -> Capture:
    return make_capture(VOLUMES, journal_limit=64 * MIB)


ONE_OF_EACH_KIND = [
    ("journal.batch.write", "enospc", 1),
    ("journal.batch.write", "short", 3),
    ("journal.batch.sync", "lost", 1),
    ("journal.batch.sync", "lost", 0),
    ("journal.segment.fill", "enospc", 3),
    ("journal.segment.header.sync", "eio", 1),
    ("journal.mark.sync", "lost", 0),
    ("journal.recycle.directory", "eio", 3),
    ("volume.apply.write", "eio", 0),
    ("volume.apply.write", "short", 3),
    ("volume.sync", "eio", 1),
    ("store.frames.FrameWriter._write.pwrite", "enospc", 0),
    ("store.frames.FrameWriter._write.pwrite", "short", 3),
    ("store.frames.FrameWriter.sync.fdatasync", "lost", 1),
    ("store.frames.FrameWriter.finish.fsync", "lost", 1),
    ("store.bundle.publish.rename", "eio", 1),
    ("store.image_files.VolumeFiles.sync.fsync", "lost", 1),
    ("twice.Twice.write.rename", "eio", 1),
    ("store.catalog.Catalog._put.upsert", "enospc", 0),
    ("journal", "enospc", 0),
    ("volume", "eio", 0),
    ("store", "enospc", 0),
]


def test_one_fault_of_each_kind_under_load(make_capture: MakeCapture, faults: Faults) -> None:
    with under_load(a_set(make_capture), faults, seed=1) as truth:
        for point, kind, times in ONE_OF_EACH_KIND:
            assert truth.round(point, kind, times)["fired"], f"{point} was never reached"
        truth.check()


def test_an_engine_that_starts_on_a_failing_disk_says_so(make_capture: MakeCapture, faults: Faults) -> None:
    with under_load(a_set(make_capture), faults, seed=2) as truth:
        fired = [row["point"] for point in start_points() if (row := truth.start_round(point))["fired"]]
        assert {"journal.replay.sync", "volume.replay.write", "volume.replay.sync", "journal.mark.directory"} <= set(
            fired
        )
        truth.check()


def test_journal_volume_and_store_fail_together(make_capture: MakeCapture, faults: Faults) -> None:
    with under_load(a_set(make_capture), faults, seed=3) as truth:
        for kind in ("enospc", "eio"):
            for disk in DISKS:
                faults.set(disk, kind, times=0)
            wait_until(lambda: all(faults.fired(disk) for disk in DISKS), what="all three disks fail")
            wait_until(lambda: truth.capture.status()["state"] == "stalled", what="writes wait")
            assert truth.work is not None
            faults.clear_all()
            truth.goes_on()
        truth.check()


def test_a_batch_whose_sync_failed_is_in_another_segment(make_capture: MakeCapture, faults: Faults) -> None:
    """What it lost is there: the sync was not tried again in the same place."""
    capture = make_capture({"data": 8 * MIB})
    capture.allowed += [r"journal: "]
    capture.start()
    with Direct(capture.device("data")) as volume:
        for number in range(1, 40):
            if number % 5 == 0:
                faults.set("journal.batch.sync", "lost")
            volume.write(0, bytes([number]) * 4096)
            found = read_journal(capture.journal).writes
            assert found[-1].data == bytes([number]) * 4096, f"write {number} was answered and is not in the journal"


def rounds(
    make_capture: MakeCapture, faults: Faults, seed: int, count: int, first: Collection[str] = ()
) -> list[dict[str, object]]:
    with under_load(a_set(make_capture), faults, seed) as truth:
        rows = truth.rounds(count, [*points_here(), *DISKS], first)
        rows += [{"compared": truth.check()}]
    return rows


def test_faults_at_random_moments(make_capture: MakeCapture, faults: Faults) -> None:
    assert len(rounds(make_capture, faults, 5, 8)) == 9


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_hundred_faults_at_random_moments(make_capture: MakeCapture, faults: Faults) -> None:
    rows: list[dict[str, object]] = []
    came: Counter[str] = Counter()
    missed: list[str] = []
    for seed in range(6):
        faults.again()
        rows += rounds(make_capture, faults, 100 + seed, 50, missed if seed > 2 else ())
        came = Counter(str(row["point"]) for row in rows if "point" in row)
        missed = sorted(set(points_here()) - set(came))
        keep_result("faults", {"faults": sum(came.values()), "by point": came, "never reached": missed, "rounds": rows})
    assert sum(came.values()) >= 300
    assert missed == []
