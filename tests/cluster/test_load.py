"""The judge judges rightly: a crash image passes, and each kind of lie is found."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp.postgres.cluster import Binaries
from pgcdp.recovery import sandbox, verify
from tests.fix_postgres import MakeCluster
from tests.load import ALLOWED, CHURN_COMMITTED, Load, check_prefix, keep_wal
from tests.scratch import scratch_directory


@pytest.fixture
def place() -> Iterator[Path]:
    path = scratch_directory("load")
    yield path
    shutil.rmtree(path)


def test_crash_images_under_load(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries, max_prepared_transactions="10", max_wal_size="200MB", log_checkpoints="off")
    live.allowed += ALLOWED
    settings = live.settings()
    load = Load(live.address(), pg_binaries, live.user, clients=4, ledgers=4, scale=1)
    load.prepare()
    moments = []
    with keep_wal(live.address(), pg_binaries, live.user, place / "wal") as wal:
        load.start()
        for number in range(3):
            load.wait_for(200)
            moments.append(time.time_ns())
            live.crash_copy(place / f"copy{number}")
        load.wait_for(50)
        result = load.stop()
        assert result.failures == []
        wal.stop()
        order = wal.order()
    assert any(ack.client == CHURN_COMMITTED for ack in result.acks)
    assert {ack.xid for ack in result.acks} <= {commit.xid for commit in order}
    held = []
    for number, moment in enumerate(moments):
        with sandbox.start(place / f"copy{number}", settings, parent=place) as box:
            judged = check_prefix(box, result.acks, order, moment)
            held.append(judged.commits)
            assert judged.promised >= 200 * (number + 1)
            assert 0 < judged.commits < judged.of_commits
            if number == 0:
                _finds_lies(box, result.acks, order, judged.commits, moment)
            else:
                checks = list(verify.verify_sandbox(box))
                assert [check for check in checks if not check.ok] == []
    assert held == sorted(held)
    assert check_prefix(live, result.acks, order, time.time_ns()).commits == len(order)


def _finds_lies(box: sandbox.Sandbox, acks: list, order: list, held: int, moment: int) -> None:  # type: ignore[type-arg]
    last = max((ack for ack in acks if ack.acked_ns < moment), key=lambda ack: ack.acked_ns)
    with pytest.raises(AssertionError, match="acknowledged commits are missing"):
        check_prefix(box, acks, order, acks[-1].acked_ns + 1)
    with pytest.raises(AssertionError, match="not a prefix"):
        check_prefix(box, acks, list(reversed(order)), moment)
    with pytest.raises(AssertionError, match="ledger rows of acknowledged commits are missing"):
        check_prefix(box, [*acks, replace(last, counter=10**9)], order, moment)
    order = order[:held]  # what is done here takes up the xids of later commits
    with box.connect() as connection:
        connection.execute("begin")
        connection.execute("delete from ledger where xid = %s", [last.xid])
        connection.execute("commit")
        with pytest.raises(AssertionError, match=r"are missing|gaps"):
            check_prefix(box, acks, order, moment)
        with pytest.raises(AssertionError, match="without their rows"):
            check_prefix(box, acks, order, 0)
        connection.execute("insert into ledger values (%s, %s, %s, '')", [last.client, last.counter, last.xid])
        connection.execute("update pgbench_tellers set tbalance = tbalance + 1 where tid = 1")
        with pytest.raises(AssertionError, match="sums differ"):
            check_prefix(box, acks, order, moment)
