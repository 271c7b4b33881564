"""One bad statement among very many good ones is found, and quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.records import Target
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet

SETTINGS = {"max_wal_size": "512MB", "checkpoint_timeout": "5min", "autovacuum": "off", "shared_buffers": "256MB"}
ALLOWED = [r"checkpoints are occurring too frequently"]
COMMIT_EACH = """
create procedure commit_each(place int, rows bigint) language plpgsql as $$
begin
  perform set_config('synchronous_commit', 'off', false);
  for i in 1..rows loop insert into filler values (place, i); commit; end loop;
end $$
"""


def find(found: ProtectedSet, *words: str) -> tuple[dict[str, Any], float]:
    """`pgcdp find` as a user runs it, and the seconds it took."""
    command = [sys.executable, "-P", "-m", "pgcdp", "find", found.name, *words, "--output", "json"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
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
        find(found, sql)
        told, seconds[sql] = find(found, sql)
        assert told["transactions"][0]["xid"] == xid
    dropped = api.resolve(found.name, Target("newest"), before="drop table x")
    assert dropped["first_out"]["xid"] == xids["DROP TABLE x"]
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
        "find_seconds": {sql: round(took, 3) for sql, took in seconds.items()},
    }


def test_the_bad_statement_is_found_among_many(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings=SETTINGS, allowed=ALLOWED)
    told = run_many(found, 100_000)
    assert told["bytes_per_transaction"] < 16


@pytest.mark.soak
def test_the_bad_statement_is_found_among_ten_million(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings=SETTINGS, allowed=ALLOWED, size=6 << 30)
    told = run_many(found, 10_000_000)
    results = os.environ.get("PGCDP_RESULTS")
    if results:
        (Path(results) / "ten-million.json").write_text(json.dumps(told, indent=1) + "\n")
    assert max(told["find_seconds"].values()) < 1.0, told
