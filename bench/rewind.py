"""How long production is down for an in-place rewind of one minute of pgbench, by the size of the database.

Each database is filled with what does not compress, then does the same work (pgbench at a fixed rate) behind a mark; it
is rewound to the mark, and that is undone, several times in turn: medians are told, and of how long Postgres did not
serve, each. The whole command proves the new boundary at its end and so grows with the database.
"""

from __future__ import annotations

import argparse
import math
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.clusters import Protected, fresh_root, tell
from bench.machine import description

RATE = 200
"""Transactions a second: the same work on a small and a large database."""


def rewind(side: Protected, mark: str) -> dict[str, Any]:
    """One rewind; what `restore --in-place` tells of it."""
    return dict(side.pgcdp("restore", "bench", "--target-name", mark, "--in-place", "--yes"))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What several rewinds took."""
    downs = [run["down_seconds"] for run in runs]
    return {
        "down_seconds": median(downs),
        "seconds": median(run["seconds"] for run in runs),
        "mb_written_back": round(median(run["bytes"] for run in runs) / 1e6, 1),
        "each_down_seconds": downs,
    }


def measure(gb: float, seconds: int, repeat: int, root: Path) -> dict[str, Any]:
    """One size, on a cluster made for it."""
    options = {"shared_buffers": "512MB", "checkpoint_timeout": "5min"}
    side = Protected(root, f"protected{gb:g}", 5713, options)
    try:
        side.create(math.ceil(gb * 1.1 + 3) << 30, "ext4", "2G", gb)
        side.pgbench("-i", "-q", "-s", "20")
        side.sql("checkpoint")
        side.pgcdp("cut", "bench")
        side.pgcdp("mark", "bench", "before-the-minute")
        side.pgbench("-n", "-c", "8", "-R", str(RATE), "-T", str(seconds))
        back, undone = list[dict[str, Any]](), list[dict[str, Any]]()
        for _ in range(repeat):
            back.append(rewind(side, "before-the-minute"))
            undone.append(rewind(side, back[-1]["undo"]))
        return {"rewind": summary(back), "undo": summary(undone)}
    finally:
        side.destroy()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="script/bench rewind", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", default="1,4,16", help="sizes of the database")
    parser.add_argument("--seconds", type=int, default=60, help="how long it works before it is rewound")
    parser.add_argument("--repeat", type=int, default=5, help="how often it is rewound, and that undone")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    sizes: dict[str, Any] = {}
    for gb in map(float, arguments.gb.split(",")):
        with fresh_root() as root:
            sizes[f"{gb:g}"] = measure(gb, arguments.seconds, arguments.repeat, root)
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
