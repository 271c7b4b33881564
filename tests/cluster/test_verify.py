"""Each check of a verification passes on a good image and finds the damage that it is there for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api, opening, proc, service
from pgcdp.background import NICE
from pgcdp.errors import UsageError
from pgcdp.fsio import write_atomic
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import BLOCK, Check
from pgcdp.recovery import sandbox, verify
from pgcdp.store.image import read_state
from pgcdp.units import parse_time
from tests.fix_postgres import BindirOf, Live, MakeCluster
from tests.fix_sets import MakeSet, ProtectedSet
from tests.flipping import flipped
from tests.scratch import scratch_directory
from tests.waiting import wait_until

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


def prover_of(found: ProtectedSet) -> int | None:
    """The process with which the agent proves boundaries."""
    words = (f"verify\0{found.name}\0--every-boundary").encode()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if words in (directory / "cmdline").read_bytes():
                return int(directory.name)
    return None


def in_background(found: ProtectedSet, wanted: bool) -> None:
    file = found.config.paths.config_file
    text = re.sub(r"(?m)^verify_boundaries = .*$", f"verify_boundaries = {str(wanted).lower()}", file.read_text())
    write_atomic(file, text.encode())  # the agent may be reading it


def proofs(found: ProtectedSet) -> dict[str, Any]:
    """What `check` tells of them, the worst first."""
    told = [each for each in api.check(found.name)["checks"] if each["name"] == "proofs"]
    return min(told, key=lambda each: bool(each["ok"]))


def is_proven(found: ProtectedSet, number: int) -> bool:
    row = next(row for row in api.info(found.name)["intervals"] if row["number"] == number)
    return row["verified"] is not None and row["verified"]["ok"]


def places_left(found: ProtectedSet) -> list[str]:
    with suppress(FileNotFoundError):
        return [str(path) for path in opening.scratch_place(found.source()).iterdir()]
    return []


def test_boundaries_are_proven_in_the_background_and_give_way(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings={"autovacuum": "off"})
    found.sql("create table t as select n as id from generate_series(1, 100000) n")
    assert prover_of(found) is None, "only when it is asked for"
    in_background(found, True)
    first = api.cut(found.name)["number"]
    prover = wait_until(lambda: prover_of(found), what="the agent begins")
    assert prover is not None
    seen: set[tuple[int, int]] = set()

    place = bytes(opening.scratch_place(found.source()).resolve())

    def sandboxes() -> bool:
        """Also of what it starts: the view's engine and Postgres. Not those of a test that runs beside this one."""
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                if place in (directory / "cmdline").read_bytes():
                    pid = int(directory.name)
                    seen.add((os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid)))
        return bool(seen) and is_proven(found, first)

    wait_until(sandboxes, timeout=120, what="it is proven")
    seen.add((os.getpriority(os.PRIO_PROCESS, prover), os.sched_getscheduler(prover)))
    assert {scheduler for _, scheduler in seen} == {os.SCHED_BATCH}
    assert min(nice for nice, _ in seen) > NICE, "the agent itself goes first"
    second = api.cut(found.name)["number"]
    wait_until(lambda: is_proven(found, second), timeout=120, what="the next one is proven, too")
    wait_until(lambda: f"last one {second}" in proofs(found)["detail"], what="check tells it")
    in_background(found, False)
    wait_until(lambda: prover_of(found) is None, timeout=60, what="it ends")
    assert "proofs" not in {check["name"] for check in api.check(found.name)["checks"]}
    wait_until(lambda: places_left(found) == [], what="it takes all away")


@pytest.mark.parametrize("victim", ["agent", "prover"])
def test_who_proves_is_killed(make_set: MakeSet, binaries_of: BindirOf, victim: str) -> None:
    """The agent's end is its end; its own end is not the last word."""
    found = make_set(
        binaries_of(15), size=384 << 20, settings={"autovacuum": "off"}, allowed=["process .* ended with -9"]
    )
    in_background(found, True)
    api.cut(found.name)
    prover = wait_until(lambda: prover_of(found), what="the agent begins")
    assert prover is not None
    wait_until(lambda: places_left(found) != [], what="it is in the middle of a proof")
    os.kill(service.ask(found.config.paths, "status")["pid"] if victim == "agent" else prover, signal.SIGKILL)
    if victim == "agent":
        wait_until(lambda: not proc.exists(prover), timeout=60, what="it ends with the agent")
        service.start(found.config)
    wait_until(lambda: prover_of(found) not in (None, prover), timeout=60, what="another one begins")
    number = api.cut(found.name)["number"]
    wait_until(lambda: is_proven(found, number), timeout=120, what="a boundary is proven")
    in_background(found, False)
    wait_until(lambda: prover_of(found) is None, timeout=60, what="it ends")
    wait_until(lambda: places_left(found) == [], what="what the killed one has left is cleared, too")


def test_a_boundary_that_is_not_right_is_told_and_the_next_one_is_looked_at(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings={"autovacuum": "off"})
    found.allowed += ["was not proven: .* has a damaged block"]
    marker = "the row on the damaged block"
    found.sql(f"create table t as select '{marker}' as words")
    found.sql("vacuum freeze t")  # the block is not written again: the next interval does not look at it
    number = api.cut(found.name)["number"]
    store = found.source().store
    wait_until(lambda: read_state(store).boundary >= number, what="the image moves")
    image = store.image / "data.img"
    places = [match.start() for match in re.finditer(marker.encode(), image.read_bytes())]
    row = next(at for at in places if -(at + len(marker)) % BLOCK < 8)  # at the end of its page, not in the WAL
    with flipped(image, row, 1):
        in_background(found, True)
        wait_until(lambda: not proofs(found)["ok"], timeout=120, what="check tells of the damage")
        number = api.cut(found.name)["number"]
        wait_until(lambda: f"boundary {number} " in proofs(found)["detail"], timeout=120, what="the next one's turn")
    number = api.cut(found.name)["number"]
    wait_until(lambda: is_proven(found, number), timeout=120, what="all is well again")
    wait_until(lambda: proofs(found)["ok"], what="check tells it")
