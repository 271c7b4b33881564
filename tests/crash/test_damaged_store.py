"""Damage anywhere in journal and store: found by a check of everything, never served, and it costs no other point.

After each flip, and with each file that is missing or cut short, every kind of point is made again. What comes back is
the right bytes by a model that knows the writes alone, or damage that names file and offset; a point that the model
says does not need what was hit must come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damaged import KINDS, Damaged, Hit, done, flips, losses
from tests.results import keep_result

AT_ONCE = 50
"""So many damages to one store, then another one is made."""


def run(place: Path, count: int, seed: int, make: Callable[[Damaged, str], Hit]) -> None:
    rows = []
    damaged: Damaged | None = None
    for number in range(count):
        if number % AT_ONCE == 0:
            damaged = Damaged(place / f"store-{number}", seed + number)
        assert damaged is not None
        hit = make(damaged, KINDS[number % len(KINDS)])
        with done(hit, damaged.chooser.randrange(8)):
            rows.append(damaged.examine(hit))
        if number % AT_ONCE == AT_ONCE - 1:
            assert all(damaged.outcome(write) is None for write in damaged.points), "put back, all is well again"
    kept: dict[str, Counter[str]] = {}
    for row in rows:
        counts = kept.setdefault(f"{row['kind']}, {row['how']}", Counter())
        counts["damages"] += 1
        if row["kind"] == "catalog":
            counts["in bytes of the catalog that nobody reads"] += "unread" in row
        counts["points made"] += row["points"] - row["lost"]
        counts["points refused"] += row["lost"]
    name = f"damage-{count}-{'flips' if make is flips else 'losses'}"
    keep_result(name, {"damages": count, "seed": seed, "by kind": kept})


def test_flips_anywhere(tmp_path: Path) -> None:
    run(tmp_path, 56, 41, flips)


def test_files_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    run(tmp_path, 28, 42, losses)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_flips_anywhere(tmp_path: Path) -> None:
    run(tmp_path, 1000, 141, flips)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_files_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    run(tmp_path, 100, 142, losses)
