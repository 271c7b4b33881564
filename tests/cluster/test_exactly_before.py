"""Exactly before a transaction, and exactly behind it: neighbours within one write are on the right sides.

Many clients share syncs, so that several commits lie in one captured write. The true order of commits comes from
pg_waldump of a copy of the WAL that pg_receivewal took.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pgcdp.postgres.cluster import Binaries
from pgcdp.records import RecoveryPoint, Target
from tests.cluster.test_postgres_truth import ALLOWED, SETTINGS
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet
from tests.load import Ack, Commit, Load, check_prefix, keep_wal
from tests.results import keep_result


def commits_at(found: ProtectedSet, point: RecoveryPoint, acks: list[Ack], order: list[Commit]) -> int:
    """How many commits of the order a point holds; AssertionError when they are not a prefix of it."""
    with found.running_at(point) as box:
        return check_prefix(box, acks, order, point.time_ns).commits


def run_points(found: ProtectedSet, points: int, commits: int, seed: int) -> list[dict[str, object]]:
    """Load, then `points` random transactions, each restored to just before it or just behind it."""
    rng = random.Random(seed)
    load = Load(found.address(), found.binaries, postgres_user(), clients=16, ledgers=16, scale=2)
    load.prepare()
    with keep_wal(found.address(), found.binaries, postgres_user(), found.root / "wal") as copy:
        begin = int(found.sql("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn")[0][0])
        load.start()
        load.wait_for(commits)
        result = load.stop()
        copy.stop()
        order = [commit for commit in copy.order() if commit.lsn >= begin]
    assert not result.failures
    found.durable()
    history = found.source().transactions().history()
    ends = [end for _, chapter in history.newest_first() for end in chapter.ends[:]]
    shared = Counter(int(end["write"]) for end in ends)
    write_of = {int(end["lsn"]): int(end["write"]) for end in ends}
    together = [place for place, commit in enumerate(order) if shared[write_of[commit.lsn]] > 1]
    assert len(together) > points, "hardly any write holds two commits"
    rows: list[dict[str, object]] = []
    for number in range(points):
        place = rng.choice(together) if number % 4 else rng.randrange(len(order))
        exclusive = number % 3 != 0
        target = Target("xid", order[place].xid, exclusive=exclusive)
        point = found.source().resolve(target)
        held = commits_at(found, point, result.acks, order)
        assert held == place + (not exclusive), f"xid {order[place].xid} is number {place}, {target} holds {held}"
        rows.append({"xid": order[place].xid, "exclusive": exclusive, "write": point.write, "lsn": point.lsn,
                     "in_write": shared[write_of[order[place].lsn]], "commits": held})  # fmt: skip
    return rows


def test_neighbours_in_one_write_are_on_the_right_sides(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings=SETTINGS, allowed=ALLOWED)
    rows = run_points(found, points=8, commits=1500, seed=7)
    assert any(row["lsn"] is not None for row in rows)


@pytest.mark.soak
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_many_transactions_exactly_before(make_set: MakeSet, pg_binaries: Binaries, fs: str) -> None:
    found = make_set(pg_binaries, fs=fs, settings=SETTINGS, allowed=ALLOWED)
    rows = run_points(found, points=100, commits=10000, seed=pg_binaries.major)
    keep_result(f"exactly-before-pg{pg_binaries.major}-{fs}", rows)
