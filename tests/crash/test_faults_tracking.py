"""Bitmap, volumes and journal fail at random moments of a gap: nothing is lost to the way back, nobody hears of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_tracking import SMALL, assert_volumes_equal_writes
from tests.faults.rounds import kinds_of
from tests.faults.service import Faults
from tests.faults.tracking import TrackingTruth, points_while_tracking
from tests.fix_engine import MIB, Capture
from tests.results import keep_result


@pytest.fixture
def capture(faulty_engine: Path, faults: Faults, scratch: Path) -> Iterator[Capture]:
    volumes = {"data": 64 * MIB, "wal": 32 * MIB}
    made = Capture(faulty_engine, scratch / "faulty", volumes, **{**SMALL, "journal_limit": 128 * MIB})
    made.start()
    yield made
    made.kill()


def rounds(capture: Capture, faults: Faults, seed: int, count: int) -> list[dict[str, Any]]:
    """So many faults that came, each point first."""
    truth = TrackingTruth(capture, faults, seed)
    rows: list[dict[str, Any]] = []
    points = points_while_tracking()
    tried = 0
    truth.load()
    try:
        while len(rows) < count:
            assert tried < 3 * count + 10, f"most faults never came: {rows}"
            point = points[tried] if tried < len(points) else truth.rng.choice(points)
            tried += 1
            row = truth.round(point, truth.rng.choice(kinds_of(point)))
            rows += [row] if row["fired"] else []
        truth.unload()
    finally:
        faults.clear_all()
        if truth.work is not None:
            truth.work.stop.set()
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, truth.keeper)
    return rows


def test_faults_at_random_moments_of_a_gap(capture: Capture, faults: Faults) -> None:
    assert len(rounds(capture, faults, 1, 5)) == 5


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_faults_at_random_moments_of_a_gap(capture: Capture, faults: Faults, seed: int) -> None:
    rows = rounds(capture, faults, seed, 25)
    came = Counter(str(row["point"]) for row in rows)
    keep_result(f"faults-tracking-{seed}", {"faults": len(rows), "by point": came, "rounds": rows})
    assert set(came) == set(points_while_tracking())
