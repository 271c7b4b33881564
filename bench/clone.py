"""From the command to the first answered query: a clone, beside a restore with pgbackrest to the same moment.

Each database is filled with what does not compress, in a volume as large as it needs, and works (8 clients, default
checkpoint settings) while clones of it are made. Before each, the page cache is dropped. Newest boundaries are opened
in turn, one of each database after the other, so that a disk that is slow for a while is slow for all sizes; then the
other points of each database, and pgbackrest beside them. What Postgres itself needs to
start and to replay is told apart: it is little at a boundary that pgcdp cut; at a checkpoint that Postgres spread it is
the WAL since that one's redo point, inside an interval the WAL since the boundary before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.clusters import BIN, PLACE, Protected, fresh_root, tell
from bench.machine import description, run

ROUNDS = 5
FIRST_PORT = 5714
MARGIN_GB = 8
"""For journals, WAL and what the load adds."""
BEGUN = 1000
"""Transactions after which a load has begun to work."""
BACK = 40
"""How many intervals before the newest one lies a point that is far back."""
PGBACKREST = """[global]
repo1-path={root}/repo
log-path={root}/log
lock-path={root}/lock
spool-path={root}/spool
start-fast=y
compress-type=zst
process-max=2
log-level-console=off
log-level-file=off
[bench]
pg1-path={pgdata}
pg1-socket-path={root}
pg1-port={port}
"""


def drop_caches() -> None:
    """Nothing of the store is in memory."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def clone_at(side: Protected, *target: str) -> dict[str, float]:
    """One clone: seconds to the first answer, and of them those of Postgres's own start and replay."""
    drop_caches()
    began = time.monotonic()
    made = side.pgcdp("clone", "bench", *target)
    run([str(BIN / "psql"), "-qAtc", "select count(*) from pgbench_branches", made["dsn"]], "root")
    took = time.monotonic() - began
    side.pgcdp("destroy", made["name"])
    return {"seconds": took, "recovery_seconds": made["recovery"]["seconds"]}


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Of several rounds, key by key."""
    print(json.dumps(found), file=sys.stderr)  # a long run shows that it goes on
    return {key: round(statistics.median(each[key] for each in found), 3) for key in found[0]}


def median_of(measure: Callable[[], dict[str, float]], rounds: int) -> dict[str, float]:
    """The medians of several rounds."""
    return medians([measure() for _ in range(rounds)])


def commits(side: Protected) -> int:
    """How many transactions its databases have seen."""
    return int(side.sql("select sum(xact_commit) from pg_stat_database"))


@contextmanager
def working(side: Protected) -> Iterator[None]:
    """8 clients meanwhile, which have begun to work."""
    command = [str(BIN / "pgbench"), "-h", str(side.root), "-p", str(side.port), "-n", "-c", "8", "-T", "36000"]
    before = commits(side)
    load = subprocess.Popen(
        [*command, "postgres"], user="postgres", cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,  # as programs on another terminal: the scheduler shares by sessions
    )  # fmt: skip
    try:
        while commits(side) < before + BEGUN:
            if load.poll() is not None:
                raise RuntimeError(f"pgbench ended with {load.returncode}")
            time.sleep(0.2)
        yield
    finally:
        load.terminate()
        load.wait()


def newest_in_turn(sides: Mapping[str, Protected], rounds: int, back: int) -> dict[str, dict[str, float]]:
    """The boundary cut last, of one database after the other and again, each under its load."""
    for side in sides.values():
        with working(side):
            for _ in range(back):
                side.pgcdp("cut", "bench")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            with working(side):
                last = side.pgcdp("cut", "bench")["number"]
                found[name].append(clone_at(side, "--target-boundary", str(last)))
    return {name: medians(each) for name, each in found.items()}


def clones(side: Protected, rounds: int, back: int) -> dict[str, Any]:
    """The other kinds of points."""
    found: dict[str, Any] = {}
    chooser = random.Random(1)

    def middle() -> dict[str, float]:
        last = intervals(side)[-1]
        return clone_at(side, "--target-write", str(chooser.randrange(last["from_write"], last["to_write"])))

    last = intervals(side)[-1]["number"]
    with spread_checkpoint(side):
        found[f"boundary_{back}_back"] = median_of(
            lambda: clone_at(side, "--target-boundary", str(last - back)), rounds
        )
        found["mid_interval"] = median_of(middle, rounds)
        found["newest_write"] = median_of(lambda: clone_at(side), rounds)
    spread = await_spread(side, last)
    found["boundary_spread"] = median_of(lambda: clone_at(side, "--target-boundary", str(spread)), rounds)
    return found


def intervals(side: Protected) -> list[dict[str, Any]]:
    """As pgcdp info lists them."""
    listed: list[dict[str, Any]] = side.pgcdp("info", "bench")["intervals"]
    return listed


@contextmanager
def spread_checkpoint(side: Protected) -> Iterator[None]:
    """Postgres completes a checkpoint meanwhile that it spreads over its time, as it does with those of its own."""
    command = [*side.psql(), "-c", "select pg_backup_start('spread', false)"]
    with subprocess.Popen(command, user="postgres", cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as p:
        yield
        if p.wait():
            raise RuntimeError("no checkpoint was made")


def await_spread(side: Protected, known: int) -> int:
    """The boundary behind `known` that was cut at a checkpoint which pgcdp had not asked for."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for interval in intervals(side):
            if interval["number"] > known and interval["reason"] == "checkpoint":
                return int(interval["number"])
        time.sleep(1)
    raise RuntimeError("the checkpoint that Postgres spread was not made a boundary")


class PgBackRest:
    """A repository on the same disk, with a full backup of the protected cluster and its WAL."""

    def __init__(self, side: Protected) -> None:
        self.side = side
        self.place = side.root / "pgbackrest"
        for name in ("", "repo", "log", "lock", "spool"):
            (self.place / name).mkdir(mode=0o700)
            shutil.chown(self.place / name, "postgres", "postgres")
        self.config = self.place / "pgbackrest.conf"
        text = PGBACKREST.format(root=self.place, pgdata=side.pgdata, port=side.port)
        self.config.write_text(text.replace(f"pg1-socket-path={self.place}", f"pg1-socket-path={side.root}"))
        self.config.chmod(0o644)

    def __enter__(self) -> PgBackRest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.side.sql("alter system reset archive_command")
        self.side.sql("select pg_reload_conf()")
        shutil.rmtree(self.place)

    def run(self, *words: str) -> None:
        """One of its commands, as the cluster's owner."""
        run(["pgbackrest", f"--config={self.config}", "--stanza=bench", *words], "postgres")

    def back_up(self) -> None:
        """From now on WAL is archived, and there is a full backup."""
        push = f"pgbackrest --config={self.config} --stanza=bench archive-push %p"
        self.side.sql(f"alter system set archive_command = '{push}'")
        self.side.sql("select pg_reload_conf()")
        self.run("stanza-create")
        self.run("backup", "--type=full")

    def restore(self, moment: str, place: Path, *more: str) -> float:
        """Seconds until the first answer at that moment."""
        drop_caches()
        began = time.monotonic()
        self.run(
            "restore", f"--pg1-path={place}", "--type=time", f"--target={moment}", "--target-action=promote", *more
        )
        sockets = place.parent
        options = f"-c port=5799 -c unix_socket_directories={sockets} -c archive_mode=off -c listen_addresses="
        run(
            [str(BIN / "pg_ctl"), "-w", "-t", "3600", "-D", str(place), "-l", "/dev/null", "-o", options, "start"],
            "postgres",
        )
        psql = [str(BIN / "psql"), "-h", str(sockets), "-p", "5799", "-qAtc"]
        run([*psql, "select count(*) from pgbench_branches", "postgres"], "postgres")
        took = time.monotonic() - began
        run([str(BIN / "pg_ctl"), "-w", "-D", str(place), "-m", "immediate", "stop"], "postgres")
        return round(took, 3)


def beside(side: Protected, peer: PgBackRest, rounds: int) -> dict[str, Any]:
    """Both to one moment just behind a boundary, in turn; pgbackrest into an empty directory, and as a delta over that.

    Medians, and the rounds.
    """
    side.pgcdp("cut", "bench")
    moment = side.sql("select clock_timestamp()")
    side.pgbench("-n", "-c", "1", "-t", "100")
    side.sql("select pg_switch_wal()")
    place = peer.place / "restored"
    found = []
    for _ in range(rounds):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700)
        shutil.chown(place, "postgres", "postgres")
        full, delta = peer.restore(moment, place), peer.restore(moment, place, "--delta")
        found.append({"full": full, "delta": delta, "clone": clone_at(side, "--target-time", moment)["seconds"]})
    return {**medians(found), "rounds": found}


def many_tables(side: Protected, count: int) -> None:
    """So many tables more, a file each."""
    for first in range(0, count, 1000):  # a transaction holds a lock for each
        make = "execute format('create table many_%s (id int primary key)', n)"
        side.sql(f"do $$ begin for n in {first + 1}..{min(first + 1000, count)} loop {make}; end loop; end $$")


def prepare(gb: float, asked: argparse.Namespace, root: Path, port: int) -> Protected:
    """A protected database of one size."""
    side = Protected(root, f"protected{gb:g}", port, {"shared_buffers": "512MB", "checkpoint_timeout": "5min"})
    try:
        side.configure_more("archive_mode = on\narchive_command = '/bin/true'\nmax_wal_size = 1GB\n")
        side.create(math.ceil(gb * 1.1 + 3) << 30, "ext4", "2G", gb, "--cut", "checkpoint")
        side.pgbench("-i", "-q", "-s", "20")
        many_tables(side, asked.tables)
        side.cut_often(asked.intervals)
    except BaseException:
        side.destroy()
        raise
    return side


def others(side: Protected, asked: argparse.Namespace) -> dict[str, Any]:
    """What is measured of one database alone."""
    found: dict[str, Any] = {}
    with working(side):
        # First: pgbackrest takes minutes under load, which would all lie in one interval between the far point and now.
        if not asked.boundary_only:
            found.update(clones(side, asked.rounds, asked.back))
        if not asked.no_pgbackrest:
            with PgBackRest(side) as peer:
                peer.back_up()
                found["pgbackrest"] = beside(side, peer, asked.rounds)
    return found


def check_room(sizes: list[float], pgbackrest: bool) -> None:
    """Raises SystemExit when the disk would be full meanwhile, in place of an hour later."""
    protected = 2 * sum(sizes)  # volumes and images
    largest = (
        4 * max(sizes) if pgbackrest else 0
    )  # with the repository and what is restored from it; the others are gone
    needs, free = max(protected, largest) + MARGIN_GB, shutil.disk_usage(PLACE).free / 1e9
    if free < needs:
        raise SystemExit(f"{PLACE} has {free:.0f} GB free, and this needs {needs:.0f}: give fewer sizes with --gb")


def measure(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All sizes."""
    gbs = sorted(map(float, asked.gb.split(",")), reverse=True)
    check_room(gbs, not asked.no_pgbackrest)
    with ExitStack() as stack:
        sides: dict[str, Protected] = {}
        ends: dict[str, ExitStack] = {}
        # The largest first: it needs its room twice while it is made.
        for number, gb in enumerate(gbs):
            ends[f"{gb:g}"] = end = stack.enter_context(ExitStack())
            side = prepare(gb, asked, end.enter_context(fresh_root()), FIRST_PORT + number)
            end.callback(side.destroy)
            sides[f"{gb:g}"] = side
        sizes: dict[str, dict[str, Any]] = {
            name: {"boundary": boundary} for name, boundary in newest_in_turn(sides, asked.rounds, asked.back).items()
        }
        for name in reversed(sides):  # the repository of the largest needs the room of the smaller
            sizes[name].update(others(sides[name], asked))
            ends[name].close()
    return {name: sizes[name] for name in reversed(sizes)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="script/bench clone", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", default="1,4,16", help="sizes of the database")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each point is opened")
    parser.add_argument("--back", type=int, default=BACK, help="intervals between the far point and the newest")
    parser.add_argument("--tables", type=int, default=0, help="tables beside those that are measured")
    parser.add_argument("--intervals", type=int, default=0, help="intervals that are in the store before it begins")
    parser.add_argument("--boundary-only", action="store_true", help="the newest boundary alone, not the other points")
    parser.add_argument("--no-pgbackrest", action="store_true", help="without the other side")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    sizes = measure(arguments)
    boundaries = {gb: found["boundary"]["seconds"] for gb, found in sizes.items()}
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": description(),
        "tables": arguments.tables,
        "intervals": arguments.intervals,
        "boundary_seconds": boundaries,
        "slowest_over_fastest": round(max(boundaries.values()) / min(boundaries.values()), 2),
        "mid_interval": {gb: found.get("mid_interval") for gb, found in sizes.items()},
        "pgbackrest": {gb: found.get("pgbackrest") for gb, found in sizes.items()},
        "by_gb": sizes,
    }
    tell(result, arguments.json)


if __name__ == "__main__":
    main()
