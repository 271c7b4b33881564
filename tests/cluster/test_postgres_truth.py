"""Postgres itself on any captured write: it starts, its checks pass, and exactly the promised commits are there.

Load: pgbench, ledger clients that note every acknowledged commit outside, and a worker that creates, drops, truncates
and rewrites tables and runs two-phase transactions. The commit order comes from pg_waldump of a copy of the WAL that
pg_receivewal took. Half of the points lie at, just before or just after delicate writes (tests/moments.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pgcdp import api
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery import sandbox, verify
from pgcdp.recovery.scratch import elsewhere, mounted
from pgcdp.recovery.source import Source
from pgcdp.store.bundle import Bundle
from tests.fix_disks import MakeDisk
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet
from tests.load import Ack, Commit, Load, check_prefix, keep_wal
from tests.moments import Moments, scratch_below
from tests.results import keep_result
from tests.spread import spread_set

SETTINGS = {
    "max_prepared_transactions": "10",
    "max_wal_size": "96MB",
    "shared_buffers": "64MB",
    "wal_compression": "off",
}
ALLOWED = [
    r"checkpoints are occurring too frequently",
    r"terminating connection",
    r"connection to client lost",
    r"unexpected EOF on client connection",
]


def prove(found: ProtectedSet, source: Source, point: RecoveryPoint, acks: list[Ack], order: list[Commit]) -> str:
    """Start Postgres on one point and judge it; what was there, in words."""
    with mounted(source, point, scratch_below(found.root)) as pgdata:
        box = sandbox.start(
            pgdata, source.settings(point), parent=pgdata.parent, binaries=found.binaries,
            elsewhere=elsewhere(source, point, pgdata),
        )  # fmt: skip
        with box:
            judged = check_prefix(box, acks, order, point.time_ns)
            checks = list(verify.verify_sandbox(box))
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    assert not failed, f"write {point.write}: {failed}"
    return f"{judged.commits} of {judged.of_commits} commits"


def written(found: ProtectedSet) -> list[dict[str, Any]]:
    """How many writes each volume has got."""
    source = found.source()
    count: Counter[int] = Counter()
    for interval in source.intervals():
        count.update(Bundle.open(source.store, interval.number).index()["volume"].tolist())
    return [{"name": volume.name, "writes": count[volume.number]} for volume in source.store.volumes]


def run_truth(
    found: ProtectedSet, points: int, commits: int, seed: int, spread: Sequence[str] = ()
) -> list[dict[str, object]]:
    """Load, then so many points of it proved. `spread`: statements that bring its tables to other volumes."""
    rng = random.Random(seed)
    load = Load(found.address(), found.binaries, postgres_user(), clients=8, ledgers=8, scale=2)
    load.prepare()
    for statement in spread:
        found.sql(statement)
    with keep_wal(found.address(), found.binaries, postgres_user(), found.root / "wal") as copy:
        begin = found.durable()  # the ledger is there from here on
        load.start()
        load.wait_for(commits)
        api.cut(found.name)
        load.wait_for(commits)
        result = load.stop()
        copy.stop()
        order = copy.order()
    assert not result.failures
    found.durable()
    source = found.source()
    devices = [volume["device"] for volume in found.status()["volumes"]]
    volumes = list(zip(devices, [volume.fs for volume in found.config.volumes], strict=True))
    moments = Moments(source, volumes, int(found.config.cluster.system_identifier))
    moments.first = begin
    rows: list[dict[str, object]] = []
    for write in moments.choose(points, rng):
        kinds = [kind for kind, numbers in moments.found.items() if {write - 1, write, write + 1} & set(numbers)]
        said = prove(found, source, source.resolve(Target("write", write)), result.acks, order)
        rows.append({"write": write, "near": kinds, "found": said})
    return rows


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_any_write_opens_under_postgres(make_set: MakeSet, pg_binaries: Binaries, fs: str) -> None:
    found = make_set(pg_binaries, fs=fs, settings=SETTINGS, allowed=ALLOWED)
    rows = run_truth(found, points=5, commits=1500, seed=pg_binaries.major)
    assert len(rows) == 5


SPREAD = (
    "alter table pgbench_accounts set tablespace fast",
    "alter index pgbench_accounts_pkey set tablespace slow",
    "alter table pgbench_history set tablespace slow",
    "alter table ledger set tablespace slow",
    "alter index ledger_pkey set tablespace fast",
    "alter system set default_tablespace = 'slow'",
    "select pg_reload_conf()",
)
"""Heaps on one volume, their indexes on another, sums of pgbench over three of them; new tables on a fourth."""


def run_spread(make_set: MakeSet, make_disk: MakeDisk, binaries: Binaries, points: int, commits: int) -> list[object]:
    """The same of a cluster on four volumes, two of them tablespaces, of two filesystems, on four disks."""
    found = spread_set(make_set, make_disk, binaries, settings=SETTINGS, allowed=ALLOWED)
    assert len({volume.backing for volume in found.config.volumes}) == 4
    assert {volume.fs for volume in found.config.volumes} == {"ext4", "xfs"}
    rows = run_truth(found, points=points, commits=commits, seed=1000 + binaries.major, spread=SPREAD)
    writes = {volume["name"]: volume["writes"] for volume in written(found)}
    assert all(writes.values()), writes
    return [*rows]


def test_any_write_of_four_volumes_opens_under_postgres(
    make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """Volumes restored at one write number that are not of one moment: an index without its rows, a sum that is off."""
    assert len(run_spread(make_set, make_disk, binaries_of(17), points=8, commits=1500)) == 8


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_writes_of_four_volumes_open_under_postgres(
    make_disk: MakeDisk, make_set: MakeSet, pg_binaries: Binaries
) -> None:
    rows = run_spread(make_set, make_disk, pg_binaries, points=50, commits=6000)
    keep_result(f"postgres-truth-pg{pg_binaries.major}-4-volumes", rows)
    assert len(rows) == 50


@pytest.mark.soak
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_fifty_writes_open_under_postgres(make_set: MakeSet, pg_binaries: Binaries, fs: str) -> None:
    found = make_set(pg_binaries, fs=fs, settings=SETTINGS, allowed=ALLOWED)
    rows = run_truth(found, points=50, commits=6000, seed=100 + pg_binaries.major)
    keep_result(f"postgres-truth-pg{pg_binaries.major}-{fs}", rows)
    assert len(rows) == 50
