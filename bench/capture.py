"""What capture costs: `script/bench capture [--quick] [--json]`.

Compared in turn, in one run: Postgres 15 on ext4 on a plain loop device over a file (direct I/O), and the same behind
pgcdp with its agent cutting, storing and moving the image. Both survive a crash of the machine with everything that was
acknowledged; the protected side can also be restored to any write. Ratios are protected / unprotected, medians of the
rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.clusters import Plain, Protected, Side
from bench.machine import MemoryLimit, description, run

CLIENTS = (1, 8)


class Plan:
    """How long everything takes."""

    def __init__(self, quick: bool) -> None:
        self.rounds = 1 if quick else 3
        self.seconds = 20 if quick else 180
        self.read_seconds = 10 if quick else 30
        self.scale = 10 if quick else 30
        self.read_scale = 20 if quick else 60
        self.checkpoint_timeout = "30s" if quick else "60s"
        self.size = 4 << 30


def say(text: str) -> None:
    """One line for people, on stderr."""
    print(text, file=__import__("sys").stderr, flush=True)


def tps_of(output: str) -> float:
    """What pgbench says."""
    return next(float(line.split()[2]) for line in output.splitlines() if line.startswith("tps"))


def tpcb(side: Side, clients: int, seconds: int, logs: Path) -> tuple[float, float]:
    """One pgbench run: (transactions per second, p99 latency in ms)."""
    prefix = logs / f"{side.name}-{clients}"
    for old in logs.glob(f"{prefix.name}*"):
        old.unlink()
    output = side.pgbench("-c", str(clients), "-j", "2", "-T", str(seconds), "-l", "--log-prefix", str(prefix))
    tps = tps_of(output)
    latencies = sorted(
        int(line.split()[2]) for file in logs.glob(f"{prefix.name}*") for line in file.read_text().splitlines()
    )
    return tps, latencies[int(len(latencies) * 0.99)] / 1000


def select_only(side: Side, plan: Plan, limit: MemoryLimit) -> float:
    """pgbench -S on a database larger than the memory that Postgres may use."""
    side.restart()
    limit.add(side.postmaster())
    output = side.pgbench("-S", "-c", "8", "-j", "2", "-T", str(plan.read_seconds))
    return tps_of(output)


def device_reads(side: Side, plan: Plan, pattern: str) -> float:
    """Bytes a second read from the block device itself, past all caches."""
    block, depth = ("8k", "8") if pattern == "randread" else ("1m", "4")
    output = run([
        "fio", "--name=read", f"--filename={side.device}", f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}",
        "--ioengine=libaio", "--direct=1", "--readonly", "--time_based", f"--runtime={plan.read_seconds // 2}",
        "--output-format=json",
    ])  # fmt: skip
    return float(json.loads(output)["jobs"][0]["read"]["bw_bytes"])


def fill(side: Side) -> None:
    """Write most of what is free, so that reads at random find content and not what was never written."""
    free = shutil.disk_usage(side.pgdata).free * 9 // 10
    file = side.pgdata / "filler"
    run(["dd", "if=/dev/urandom", f"of={file}", "bs=1M", f"count={free >> 20}", "conv=fsync"])


def measure_writes(plain: Plain, protected: Protected, plan: Plan, logs: Path) -> dict[str, Any]:
    """TPC-B on both sides in turn."""
    rows = []
    for clients in CLIENTS:
        for number in range(plan.rounds):
            sides: list[Side] = [plain, protected] if number % 2 == 0 else [protected, plain]
            found = {}
            for side in sides:
                protected.pgcdp("cut", "bench")  # what is left to store of one run shall not slow the next
                found[side.name] = tpcb(side, clients, plan.seconds, logs)
            row = {
                "clients": clients,
                "tps": {name: round(value[0], 1) for name, value in found.items()},
                "p99_ms": {name: value[1] for name, value in found.items()},
                "ratio": found["protected"][0] / found["plain"][0],
                "p99_ratio": found["protected"][1] / found["plain"][1],
            }
            rows.append(row)
            say(f"{clients} clients: {row['tps']} ratio {row['ratio']:.2f}, p99 {row['p99_ms']}")
    return {
        "runs": rows,
        "tps_ratio": {str(c): _median(rows, c, "ratio") for c in CLIENTS},
        "p99_ratio": {str(c): _median(rows, c, "p99_ratio") for c in CLIENTS},
    }


def _median(rows: list[dict[str, Any]], clients: int, key: str) -> float:
    values = [float(row[key]) for row in rows if row["clients"] == clients]
    return round(statistics.median(values), 3)


def measure_reads(plain: Plain, protected: Protected, plan: Plan) -> dict[str, Any]:
    """Reads on both sides in turn: Postgres with little memory, the devices at random and in sequence."""
    ratios: dict[str, list[float]] = {"pgbench_select": [], "random": [], "sequential": []}
    for _ in range(plan.rounds):
        limits = [MemoryLimit(f"pgcdp-bench-{side.name}-{time.time_ns()}", 256 << 20) for side in (plain, protected)]
        rates = [select_only(side, plan, limit) for side, limit in zip((plain, protected), limits, strict=True)]
        for side, limit in zip((plain, protected), limits, strict=True):
            side.restart()
            limit.remove()
        ratios["pgbench_select"].append(rates[1] / rates[0])
        for name, pattern in (("random", "randread"), ("sequential", "read")):
            ratios[name].append(device_reads(protected, plan, pattern) / device_reads(plain, plan, pattern))
        say("reads: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in ratios.items()))
    medians = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    return {"read_ratios": medians, "read_ratio": min(medians.values())}


def measure(plan: Plan, root: Path) -> dict[str, Any]:
    """Everything, on two clusters made for it."""
    options = {"shared_buffers": "512MB", "checkpoint_timeout": plan.checkpoint_timeout}
    plain, protected = Plain(root, "plain", 5711, options), Protected(root, "protected", 5712, options)
    logs = Path(tempfile.mkdtemp(prefix="pgcdp-bench-", dir="/dev/shm"))
    logs.chmod(0o777)
    try:
        plain.create(plan.size, "ext4")
        protected.create(plan.size, "ext4", "4G")
        for side in (plain, protected):
            side.pgbench("-i", "-q", "-s", str(plan.scale))
        protected.pgcdp("cut", "bench")
        before = protected.cost()
        writes = measure_writes(plain, protected, plan, logs)
        protected.pgcdp("cut", "bench")
        after = protected.cost()
        captured = after["bytes_captured"] - before["bytes_captured"]
        intervals = protected.pgcdp("info", "bench")["intervals"]
        for side in (plain, protected):
            side.pgbench("-i", "-q", "-s", str(plan.read_scale))
            with (side.pgdata / "postgresql.conf").open("a") as conf:
                conf.write("shared_buffers = 32MB\n")
            fill(side)
        protected.pgcdp("cut", "bench")
        reads = measure_reads(plain, protected, plan)
    finally:
        for side in (plain, protected):
            side.destroy()
        shutil.rmtree(logs)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": description(),
        **writes,
        **reads,
        "engine_rss_mib": round(after["engine_rss_mib"], 1),
        "agent_rss_mib": round(after["agent_rss_mib"], 1),
        "agent_cpu_s_per_gb": round((after["agent_cpu"] - before["agent_cpu"]) / (captured / 2**30), 2),
        "engine_cpu_s_per_gb": round((after["engine_cpu"] - before["engine_cpu"]) / (captured / 2**30), 2),
        "bytes_captured": int(captured),
        "bytes_stored": sum(sum(row["stored"].values()) for row in intervals[1:]),
        "intervals": len(intervals) - 1,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="script/bench capture", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter run of the same, for a first look")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="pgcdp-bench-", dir="/var/tmp"))
    root.chmod(0o755)
    shutil.chown(root, "postgres", "postgres")
    try:
        result = measure(Plan(arguments.quick), root)
    finally:
        if not subprocess.run(["findmnt", "-rn", "-o", "TARGET", "--submounts", str(root)], capture_output=True).stdout:
            shutil.rmtree(root)
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            if key != "runs":
                print(f"{key:20} {value}")


if __name__ == "__main__":
    main()
