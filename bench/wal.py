"""How fast WAL inside captured writes is read, and what a transaction costs in the index.

Three kinds of work behind capture, each in an interval of its own: pgbench (each commit rewrites the tail of the WAL,
so that a page is captured many times), a procedure that commits each row (synchronous_commit = off), and COPY. Then the
engine reads each interval again, several times; what counts is processor time, decompression of the store's frames
included.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from bench.clusters import Protected, fresh_root, tell
from bench.machine import description
from pgcdp.intervals.indexing import Start
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store

ROUNDS = 5
COMMIT_EACH = """
create table each_row (id bigint);
create procedure commit_each(rows bigint) language plpgsql as
$$ begin perform set_config('synchronous_commit', 'off', false);
for i in 1..rows loop insert into each_row values (i); commit; end loop; end $$;
"""


def run_each(side: Protected, quick: bool) -> list[tuple[str, int]]:
    """Do each kind of work; (name, number of its interval)."""
    rows = 200_000 if quick else 2_000_000
    side.pgbench("-i", "-q", "-s", "20")
    for statement in COMMIT_EACH.strip().split(";\n", 1):
        side.sql(statement)
    side.pgcdp("cut", "bench")
    work: list[tuple[str, Callable[[], Any]]] = [
        ("pgbench", lambda: side.pgbench("-n", "-c", "8", "-T", "5" if quick else "60")),
        ("commit_each", lambda: side.sql(f"call commit_each({rows})")),
        ("copy", lambda: side.sql(
            f"create table bulk as select n, repeat(md5(n::text), 8) t from generate_series(1, {rows}) n")),
    ]  # fmt: skip
    found = []
    for name, do in work:
        first = side.pgcdp("cut", "bench")["number"] + 1
        do()
        last = side.pgcdp("cut", "bench")["number"]
        found += [(name, number) for number in range(first, last + 1)]
    return found


def read_again(store: Store, number: int, identifier: int) -> tuple[float, int, int]:
    """Processor seconds of the engine, bytes of WAL, and transactions of one interval."""
    before = Bundle.open(store, number - 1).interval.boundary
    start = Start.of(store, before, {}, identifier)
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    readout = start.read([store.interval(number)], tables=store.path.with_suffix(".wal"))
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime
    wal = int(readout.wal["to_lsn"][-1] - readout.wal["from_lsn"][0]) if len(readout.wal) else 0
    return seconds, wal, len(readout.ends)


def measure(side: Protected, quick: bool) -> dict[str, Any]:
    """Everything, on a cluster made for it."""
    intervals = run_each(side, quick)
    store = Store.open(side.root / "store")
    identifier = int(store.extra["cluster"]["system_identifier"])
    kinds: dict[str, dict[str, float]] = {}
    for name, number in intervals:
        runs = [read_again(store, number, identifier) for _ in range(ROUNDS)]
        bundle = Bundle.open(store, number)
        kind = kinds.setdefault(name, {"seconds": 0.0, "wal": 0, "transactions": 0, "captured": 0, "index": 0})
        kind["seconds"] += statistics.median(run[0] for run in runs)
        kind["wal"] += runs[0][1]
        kind["transactions"] += runs[0][2]
        kind["captured"] += bundle.interval.bytes_written
        kind["index"] += bundle.manifest["files"]["transactions.parquet"]["bytes"]
    told: dict[str, Any] = {}
    for name, kind in kinds.items():
        told[name] = {
            "mb_per_s": round(kind["wal"] / 1e6 / kind["seconds"], 1),
            "captured_mb_per_s": round(kind["captured"] / 1e6 / kind["seconds"], 1),
            "wal_mb": round(kind["wal"] / 1e6, 1),
            "transactions": int(kind["transactions"]),
            "bytes_per_transaction": round(kind["index"] / max(1, kind["transactions"]), 2),
        }
    total = {name: sum(kind[name] for kind in kinds.values()) for name in ("wal", "seconds", "index", "transactions")}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": description(),
        "mb_per_s": round(total["wal"] / 1e6 / total["seconds"], 1),
        "bytes_per_transaction": round(total["index"] / total["transactions"], 2),
        "kinds": told,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="script/bench wal", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter run of the same, for a first look")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with fresh_root() as root:
        side = Protected(root, "protected", 5712, {"shared_buffers": "512MB", "checkpoint_timeout": "1h"})
        try:
            side.create(8 << 30, "ext4", "4G")
            result = measure(side, arguments.quick)
        finally:
            side.destroy()
    tell(result, arguments.json)


if __name__ == "__main__":
    main()
