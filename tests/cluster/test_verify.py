"""Each check of a verification passes on a good image and finds the damage that it is there for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgcdp import api
from pgcdp.errors import UsageError
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Check
from pgcdp.recovery import sandbox, verify
from pgcdp.units import parse_time
from tests.fix_postgres import BindirOf, Live, MakeCluster
from tests.fix_sets import MakeSet
from tests.scratch import scratch_directory

CHECKS = sorted((Path(__file__).resolve().parents[2] / "sql" / "checks").glob("*.sql"))


@pytest.fixture
def place() -> Iterator[Path]:
    path = scratch_directory("verify")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def pg15(binaries_of: BindirOf) -> Binaries:
    return binaries_of(15)


def filled(live: Live) -> None:
    live.sql("create table t as select n, md5(n::text) as v from generate_series(1, 5000) n")
    live.sql("create index t_n on t (n)")


def image(live: Live, place: Path) -> Path:
    """A cleanly stopped image: no replay mends what a test breaks."""
    live.sql("checkpoint")
    live.stop()
    return live.crash_copy(place / "copy")


def file_of(live: Live, relation: str) -> str:
    return str(live.sql(f"select pg_relation_filepath('{relation}')")[0][0])


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.ok}


def test_a_good_image(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries)
    filled(live)
    live.sql("create database shop")
    live.sql("create table orders (n int)", "shop")
    (place / "own.sql").write_text(
        "-- name: t is full\nselect count(*) = 5000 from t, pg_sleep(1);\n"
        "-- name: no order is negative\n-- database: shop\nselect * from orders where n < 0;\n"
    )
    settings = live.settings()
    copy = live.crash_copy(place / "copy")
    heard: list[tuple[str, float]] = []
    checks = verify.verify_directory(
        copy,
        settings,
        parent=place,
        sql=place / "own.sql",
        checks=CHECKS,
        owns_data=True,
        report=lambda name: heard.append((name, time.monotonic())),
    )
    assert failed(checks) == {}
    assert [name for name, _ in heard] == [check.name for check in checks[1:]]
    for check, (_, began), (_, ended) in zip(checks[1:], heard, heard[1:], strict=False):
        assert check.seconds <= ended - began < check.seconds + 5, f"{check.name} was told at another's time"
    assert [check.name for check in checks] == [
        "recovery",
        "amcheck",
        "check: every index, column and TOAST table belongs to a relation",
        "check: no index is invalid",
        "check: no prepared transaction is pending",
        "check: every relation has its file",
        "sql: t is full",
        "sql: no order is negative",
        "shutdown",
        "checksums",
    ]
    assert "shop" in checks[1].detail
    assert checks[-1].detail.endswith(" pages")
    assert sorted(each.name for each in place.iterdir()) == ["own.sql"]


def test_assertions_that_fail(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15)
    filled(live)
    (place / "own.sql").write_text(
        "select false;\nselect null::bool;\nselect true, true;\nselect true from generate_series(1, 2);\nselect 1;\n"
        "-- name: broken\nselect * from nowhere;\n-- name: no query\ncreate table x ();\n"
        "-- name: elsewhere\n-- database: missing\nselect true;\n"
        "-- severity: warning\n-- database: postgres\n-- name: a remark\nselect 7;\n"
        "-- needs: version 99\nselect false and 1;\n"
    )
    copy = live.crash_copy(place / "copy")
    checks = verify.verify_directory(copy, live.settings(), parent=place, sql=place / "own.sql")
    assert failed(checks) == {
        "sql: select false": "postgres: 1 rows: False",
        "sql: select null::bool": "postgres: 1 rows: None",
        "sql: select true, true": "postgres: 1 rows: True, True",
        "sql: select true from generate_series(1, 2)": "postgres: 2 rows: True; True",
        "sql: select 1": "postgres: 1 rows: 1",
        "sql: broken": 'postgres: relation "nowhere" does not exist | LINE 1: select * from nowhere | ^',
        "sql: no query": "postgres: gives no rows but CREATE TABLE: an assertion is a query",
        "sql: elsewhere": failed(checks)["sql: elsewhere"],
    }
    assert 'database "missing" does not exist' in failed(checks)["sql: elsewhere"]
    details = {check.name: check.detail for check in checks}
    assert details["sql: a remark"] == "warning: postgres: 1 rows: 7"
    assert details["sql: select false and 1"] == "skipped: needs PostgreSQL 99"
    (place / "empty.sql").write_text("")
    with pytest.raises(UsageError):
        verify.verify_directory(place / "copy", None, parent=place, sql=place / "empty.sql")


def test_a_page_that_rotted(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries)
    filled(live)
    path = file_of(live, "t")
    settings = live.settings()
    copy = image(live, place)
    with (copy / path).open("r+b") as file:
        file.seek(3 * 8192 + 4000)
        file.write(b"rot")
    found = failed(verify.verify_directory(copy, settings, parent=place))
    assert set(found) == {"amcheck", "checksums"}
    assert path.rsplit("/", 1)[1] in found["checksums"]


def test_an_index_that_lacks_a_row(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """An older version of the index's file: each page is right by itself, so no page checksum tells."""
    live = make_cluster(pg_binaries)
    filled(live)
    path = file_of(live, "t_n")
    live.sql("checkpoint")
    older = (live.pgdata / path).read_bytes()
    live.sql("insert into t values (100000, 'new')")
    settings = live.settings()
    copy = image(live, place)
    (copy / path).write_bytes(older)
    found = failed(verify.verify_directory(copy, settings, parent=place))
    assert set(found) == {"amcheck"}
    assert "t_n" in found["amcheck"]
    with sandbox.start(copy, settings, parent=place) as box:
        by_sql = verify.amcheck_by_sql(box)
        assert not by_sql.ok
        assert "lacks matching index tuple" in by_sql.detail


def test_a_file_that_is_gone(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15)
    live.sql("create table empty (n int)")
    path = file_of(live, "empty")
    settings = live.settings()
    copy = image(live, place)
    (copy / path).unlink()
    found = failed(verify.verify_directory(copy, settings, parent=place, checks=CHECKS))
    assert "empty" in found["check: every relation has its file"]


def test_without_page_checksums(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15, start=False)
    live.program("pg_checksums", "--disable", "-D", str(live.pgdata))
    live.start()
    live.sql("create table t (n int primary key)")
    with sandbox.start(live.crash_copy(place / "copy"), live.settings(), parent=place) as box:
        assert verify.amcheck_by_sql(box).ok
        last = list(verify.verify_sandbox(box))[-1]
    assert (last.name, last.ok) == ("checksums", True)
    assert last.detail.startswith("skipped: this cluster has no page checksums")


def test_a_recovery_that_fails_is_a_failed_check(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15)
    copy = live.crash_copy(place / "copy")
    shutil.rmtree(copy / "pg_xact")
    live.sql("checkpoint")
    (check,) = verify.verify_directory(copy, live.settings(), parent=place)
    assert (check.name, check.ok) == ("recovery", False)
    assert "pg_xact" in check.detail


def test_writes_at_random_and_each_boundary_are_proven(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("create table t as select n as id from generate_series(1, 1000) n")
        api.cut(found.name)
        session.execute("insert into t select n from generate_series(1, 1000) n")
    told = api.verify_sample(found.name, 3)
    assert told["ok"]
    writes = [each["recovery_point"]["write"] for each in told["results"]]
    assert len(set(writes)) == 3
    assert writes == sorted(writes)
    command = [sys.executable, "-P", "-m", "pgcdp", "verify", "--every-boundary", "--output", "json"]
    began = time.time_ns()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None
    try:
        boundaries = [json.loads(process.stdout.readline())["recovery_point"]["boundary"]]
        for _ in range(2):
            api.cut(found.name)
        boundaries += [json.loads(process.stdout.readline())["recovery_point"]["boundary"] for _ in range(2)]
    finally:
        process.terminate()
        assert process.wait(60) == 143
        process.stdout.close()
    assert boundaries == [1, 2, 3]
    intervals = api.info(found.name)["intervals"]
    assert all(each["verified"]["ok"] for each in intervals)
    assert all(began <= parse_time(each["verified"]["time"]) <= time.time_ns() for each in intervals), "last proven"
    shown = subprocess.run([*command[:4], "info"], capture_output=True, text=True, cwd="/", check=True).stdout
    assert len(re.findall(r"ok \d{4}-\d\d-\d\dT\d\d:\d\dZ", shown)) == len(intervals)
