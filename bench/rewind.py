"""How long production is down for an in-place rewind of one minute of pgbench, by the size of the database.

Each database is filled with what does not compress, then does the same work (pgbench at a fixed rate) behind a mark; it
is rewound to the mark, and that is undone. Apart from how long Postgres did not serve, the whole command is told, which
proves the new boundary at its end and so grows with the database.
"""

from __future__ import annotations

import argparse
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.clusters import Protected, fresh_root, tell
from bench.machine import description

RATE = 200
"""Transactions a second: the same work on a small and a large database."""


def rewind(side: Protected, mark: str) -> dict[str, Any]:
    """One rewind; what it took."""
    told = side.pgcdp("restore", "bench", "--target-name", mark, "--in-place", "--yes")
    return {
        "down_seconds": told["down_seconds"],
        "seconds": told["seconds"],
        "mb_written_back": round(told["bytes"] / 1e6, 1),
        "undo": told["undo"],
    }


def measure(gb: float, seconds: int, root: Path) -> dict[str, Any]:
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
        back = rewind(side, "before-the-minute")
        undone = rewind(side, back.pop("undo"))
        undone.pop("undo")
        return {"rewind": back, "undo": undone}
    finally:
        side.destroy()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="script/bench rewind", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", default="1,4,16", help="sizes of the database")
    parser.add_argument("--seconds", type=int, default=60, help="how long it works before it is rewound")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    sizes: dict[str, Any] = {}
    for gb in map(float, arguments.gb.split(",")):
        with fresh_root() as root:
            sizes[f"{gb:g}"] = measure(gb, arguments.seconds, root)
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
