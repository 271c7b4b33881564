"""When the store is full: said too late, it is no warning."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pgcdp import forecast
from pgcdp.config import Config
from pgcdp.records import Boundary, Interval
from pgcdp.serving.rates import Rates


def settings(store: Path) -> Config:
    return cast(Config, SimpleNamespace(store=store, volumes=()))


def stored(bytes_a_second: int) -> list[Interval]:
    """One interval of ten minutes that has just ended, with so much in its bundle."""
    now = time.time_ns()
    size = {"writes": 600 * bytes_a_second}
    return [Interval(1, 1, 9, now - 600 * 10**9, now, cast(Boundary, None), 9, 4096, 1, size)]


@pytest.mark.parametrize(("kept", "seen"), [(1000, 3000), (3000, 1000), (1000, -500), (1000, None)])
def test_the_faster_of_what_is_kept_and_what_the_disk_shows(tmp_path: Path, kept: int, seen: int | None) -> None:
    """What retention gives back hides nothing; nor is the image left out, which no interval tells of."""
    told = {"store": None if seen is None else {"bytes_per_second": seen, "over_seconds": 600.0}}
    found = forecast.of_store(settings(tmp_path), told, stored(kept))
    assert found is not None
    assert found.rate is not None
    assert found.rate.bytes_per_second == pytest.approx(max(kept, seen or 0), rel=0.01)
    assert found.seconds == pytest.approx(found.room / max(kept, seen or 0), rel=0.01)


def test_what_the_image_takes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk's own count, over the time that it is asked for."""
    seen = Rates(settings(tmp_path))
    monkeypatch.setattr("pgcdp.serving.rates.time.monotonic", lambda: 100.0)
    seen.read_store()
    with (tmp_path / "image").open("wb") as image:
        os.posix_fallocate(image.fileno(), 0, 64 << 20)
    monkeypatch.setattr("pgcdp.serving.rates.time.monotonic", lambda: 200.0)
    seen.read_store()
    told = seen.told()["store"]
    assert told is not None
    assert told["over_seconds"] == 100
    assert told["bytes_per_second"] == pytest.approx((64 << 20) / 100, rel=0.5), "others use the disk, too"
