"""One bad statement among very many good ones is found, and quickly."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest

from pgcdp import api
from pgcdp.errors import TargetError
from pgcdp.intervals.indexing import Start
from pgcdp.records import Target
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.results import keep_result

SETTINGS = {"max_wal_size": "512MB", "checkpoint_timeout": "5min", "autovacuum": "off", "shared_buffers": "256MB"}
ALLOWED = [r"checkpoints are occurring too frequently"]
COMMIT_EACH = """
create procedure commit_each(place int, rows bigint) language plpgsql as $$
begin
  perform set_config('synchronous_commit', 'off', false);
  for i in 1..rows loop insert into filler values (place, i); commit; end loop;
end $$
"""


def again(ask: Callable[[], tuple[dict[str, Any], float]]) -> tuple[dict[str, Any], list[float]]:
    """An answer, and the seconds that each of five calls took behind the first one."""
    ask()
    took = []
    for _ in range(5):
        told, seconds = ask()
        took.append(round(seconds, 3))
    return told, took


def find(found: ProtectedSet, *words: str) -> tuple[dict[str, Any], float]:
    """`pgcdp find` as a user runs it, and the seconds it took."""
    command = [sys.executable, "-P", "-m", "pgcdp", "find", found.name, *words, "--output", "json"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told, took


def resolve_before(found: ProtectedSet, sql: str) -> tuple[dict[str, Any], float]:
    """What `--before` resolves to, in a process of its own as the commands do it, and the seconds that it took."""
    code = """if True:
        import json, sys
        from pgcdp import api
        from pgcdp.records import Target
        print(json.dumps(api.resolve(sys.argv[1], Target("newest"), before=sys.argv[2])))"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, found.name, sql], capture_output=True, text=True, cwd="/", check=True
    )
    took = time.monotonic() - began
    told: dict[str, Any] = json.loads(done.stdout)
    return told, took


def fill(found: ProtectedSet, transactions: int) -> None:
    """So many transactions of a row each, made by two sessions; with boundaries between them."""
    failures: list[BaseException] = []

    def half(place: int) -> None:
        try:
            with found.connect() as session:
                session.execute("call commit_each(%s, %s)", [place, transactions // 2])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=half, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def run_many(found: ProtectedSet, transactions: int) -> dict[str, Any]:
    """The demo's mistake and a dropped table, in the middle of it all."""
    with found.connect() as session:
        session.execute("create table filler (place int, n bigint)")
        session.execute(COMMIT_EACH)
        session.execute("create table orders (id int primary key, status text)")
        session.execute("insert into orders select n, 'paid' from generate_series(1, 1000) n")
        session.execute("create table x (id int)")
        session.execute("delete from orders where id = 1000")
    fill(found, transactions // 2)
    xids = {}
    for sql in ("DELETE FROM orders WHERE status = 'paid'", "DROP TABLE x"):
        with found.connect() as session, session.transaction():
            session.execute(sql.encode())
            row = session.execute("select pg_current_xact_id()::text::bigint").fetchone()
            assert row is not None
            xids[sql] = row[0]
    fill(found, transactions - transactions // 2)
    api.cut(found.name)
    seconds = {}
    for sql, xid in xids.items():
        told, seconds[sql] = again(partial(find, found, sql))
        assert told["transactions"][0]["xid"] == xid
    told, before_seconds = again(partial(resolve_before, found, "drop table x"))
    assert told["first_out"]["xid"] == xids["DROP TABLE x"]
    with pytest.raises(TargetError) as several:  # one row of it was deleted at the beginning, too
        api.resolve(found.name, Target("newest"), before="DELETE FROM orders")
    assert str(xids["DELETE FROM orders WHERE status = 'paid'"]) in str(several.value.candidates)
    store = Store.open(found.store)
    bundles = [Bundle.open(store, number) for number in store.interval_numbers()]
    said = [bundle.transactions or {"count": 0} for bundle in bundles]
    count = sum(each["count"] for each in said)
    size = sum(bundle.manifest["files"]["transactions.parquet"]["bytes"] for bundle in bundles)
    assert count >= transactions
    return {
        "transactions": count,
        "intervals": len(bundles),
        "bytes_per_transaction": round(size / count, 2),
        "find_seconds": {sql: median(took) for sql, took in seconds.items()},
        "find_seconds_each": seconds,
        "before_seconds": median(before_seconds),
        "before_seconds_each": before_seconds,
    }


def test_the_bad_statement_is_found_among_many(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings=SETTINGS, allowed=ALLOWED)
    told = run_many(found, 100_000)
    assert told["bytes_per_transaction"] < 16


@pytest.mark.soak
def test_the_bad_statement_is_found_among_ten_million(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings=SETTINGS, allowed=ALLOWED, size=6 << 30)
    told = run_many(found, 10_000_000)
    keep_result("ten-million", told)
    assert max(*told["find_seconds"].values(), told["before_seconds"]) < 1.0, told


def reading_seconds(found: ProtectedSet, number: int) -> tuple[float, float]:
    """Processor time of the engine's reading of an interval, and the MB of WAL in it."""
    store = Store.open(found.store)
    before = Bundle.open(store, number - 1).interval.boundary
    start = Start.of(store, before, {}, int(found.config.cluster.system_identifier))
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    readout = start.read([store.interval(number)], tables=found.root / "tables")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    wal = int(readout.wal["to_lsn"][-1] - readout.wal["from_lsn"][0])
    return ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime, wal / 1e6


def test_many_tables_in_one_transaction_are_read_as_fast_as_one(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """What a transaction did to each file is not looked for one by one."""
    settings = {"autovacuum": "off", "max_wal_size": "1GB", "max_locks_per_transaction": "2000"}
    found = make_set(binaries_of(15), settings=settings, size=1 << 30)
    with found.connect() as session:
        session.execute("create table p (id int) partition by list (id); create table one (id int)")
        session.execute("do $$ begin for i in 0..2999 loop execute format("
                        "'create table p%s partition of p for values in (%s)', i, i); end loop; end $$")  # fmt: skip
        cost = []
        for table in ("one", "p"):
            api.cut(found.name)
            rows = "select n * 7919::bigint % 3000 from generate_series(1, 200000) n"
            session.execute(f"insert into {table} {rows}".encode())
            number = api.cut(found.name)["number"]
            told = next(each for each in api.log(found.name, limit=10)["transactions"] if each["tables"])
            assert sum(each["inserted"] for each in told["tables"]) == 200_000
            seconds, megabytes = min(reading_seconds(found, number) for _ in range(3))
            cost.append(seconds / megabytes)
            print(table, f"{seconds:.2f} s, {megabytes:.1f} MB, {megabytes / seconds:.0f} MB/s")
        dropped = session.execute("select count(*) from pg_class where relname ~ '^p[0-9]+$'").fetchall()[0][0]
        session.execute("drop table p")
    told = api.log(found.name, limit=1)["transactions"][0]
    assert sum(each["dropped"] for each in told["tables"]) == dropped == 3000
    assert cost[1] < 3 * cost[0]
