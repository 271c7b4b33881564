"""The names in a directory are those that are there, however soon after a change they are asked for."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from pgcdp.store import entries as kept
from pgcdp.store.entries import entries


class CoarseClock:
    """Times of change as a kernel gives them whose clock ticks so seldom: its start, and no more."""

    def __init__(self, tick_ns: int) -> None:
        self.tick_ns = tick_ns
        self._stat = os.stat

    def stat(self, path: Any, **options: Any) -> os.stat_result:
        exact = self._stat(path, **options)
        return os.stat_result(list(exact), {"st_ctime_ns": exact.st_ctime_ns // self.tick_ns * self.tick_ns})


@pytest.mark.parametrize("tick_ns", [1, 10_000_000, 1_000_000_000])
def test_a_change_right_after_a_look_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tick_ns: int) -> None:
    """Two changes within a tick bear the same time."""
    monkeypatch.setattr(os, "stat", CoarseClock(tick_ns).stat)
    chooser = random.Random(5)
    places = [tmp_path / f"{number}" for number in range(3)]
    for place in places:
        place.mkdir()
    until = time.monotonic() + max(0.5, 3 * tick_ns / 1e9)
    looks = 0
    while time.monotonic() < until or looks <= 300:  # a name may wait long for a disk that others use, too
        place = chooser.choice(places)
        names = os.listdir(place)
        if names and chooser.random() < 0.5:
            (place / chooser.choice(names)).rename(chooser.choice(places) / f"{chooser.randrange(9)}")
        else:
            (place / f"{chooser.randrange(9)}").touch()
        for each in places:
            assert sorted(entries(each)) == sorted(os.listdir(each))
            looks += 1


def test_what_did_not_change_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").touch()
    monkeypatch.setattr(kept, "TICK_NS", -1_000_000_000)
    first = entries(tmp_path)
    assert entries(tmp_path) is first
    (tmp_path / "two").touch()
    assert sorted(entries(tmp_path)) == ["one", "two"]


def test_another_directory_in_its_place_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "TICK_NS", -1_000_000_000)
    place, other = tmp_path / "place", tmp_path / "other"
    for each in (place, other):
        each.mkdir()
    (other / "one").touch()
    assert entries(place) == ()
    place.rename(tmp_path / "before")
    other.rename(place)
    assert entries(place) == ("one",)
    (place / "one").unlink()
    place.rmdir()
    with pytest.raises(FileNotFoundError):
        entries(place)
