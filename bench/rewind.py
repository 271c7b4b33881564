"""How long production is down for an in-place rewind of one minute of pgbench, by the size of the database.

Each database is filled with what does not compress, then does the same work (pgbench at a fixed rate) behind a mark.
Then they are rewound to their marks, and that is undone, in turn and several times, so that a disk that is slow for a
while is slow for all of them. Medians are told, and of how long Postgres did not serve, each. The whole command proves
the new boundary at its end and so grows with the database.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.clusters import Protected, fresh_root, tell
from bench.machine import description

FIRST_PORT = 5713
RATE = 200
"""Transactions a second: the same work on a small and a large database."""


def rewind(side: Protected, mark: str) -> dict[str, Any]:
    """One rewind; what `restore --in-place` tells of it."""
    return dict(side.pgcdp("restore", "bench", "--target-name", mark, "--in-place", "--yes"))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What several rewinds took."""
    downs = [run["down_seconds"] for run in runs]
    return {
        "down_seconds": round(median(downs), 3),
        "seconds": round(median(run["seconds"] for run in runs), 3),
        "mb_written_back": round(median(run["bytes"] for run in runs) / 1e6, 1),
        "each_down_seconds": downs,
    }


def prepare(gb: float, seconds: int, root: Path, port: int) -> Protected:
    """A database of one size that has done its work."""
    options = {"shared_buffers": "512MB", "checkpoint_timeout": "5min"}
    side = Protected(root, f"protected{gb:g}", port, options)
    try:
        side.create(math.ceil(gb * 1.1 + 3) << 30, "ext4", "2G", gb)
        side.pgbench("-i", "-q", "-s", "20")
        side.sql("checkpoint")
        side.pgcdp("cut", "bench")
        side.pgcdp("mark", "bench", "before-the-minute")
        side.pgbench("-n", "-c", "8", "-R", str(RATE), "-T", str(seconds))
    except BaseException:
        side.destroy()
        raise
    return side


def in_turn(sides: Mapping[str, Protected], repeat: int) -> dict[str, Any]:
    """Rewind each of them and undo that, `repeat` times."""
    back: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    undone: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, side in sides.items():
            back[name].append(rewind(side, "before-the-minute"))
            undone[name].append(rewind(side, back[name][-1]["undo"]))
    return {name: {"rewind": summary(back[name]), "undo": summary(undone[name])} for name in sides}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="script/bench rewind", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", default="1,4,16", help="sizes of the database")
    parser.add_argument("--seconds", type=int, default=60, help="how long it works before it is rewound")
    parser.add_argument("--repeat", type=int, default=5, help="how often it is rewound, and that undone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        sides: dict[str, Protected] = {}
        for number, gb in enumerate(map(float, arguments.gb.split(","))):
            side = prepare(gb, arguments.seconds, stack.enter_context(fresh_root()), FIRST_PORT + number)
            stack.callback(side.destroy)
            sides[f"{gb:g}"] = side
        sizes = in_turn(sides, arguments.repeat)
    downs = [size["rewind"]["down_seconds"] for size in sizes.values()]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": description(),
        "by_gb": sizes,
        "slowest_over_fastest": round(max(downs) / min(downs), 2),
    }
    tell(result, arguments.json)


if __name__ == "__main__":
    main()
