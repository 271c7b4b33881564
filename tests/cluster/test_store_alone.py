"""The store is enough: from a copy of it, on a machine that has nothing else, Postgres comes up right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcdp import api, scrubbing
from pgcdp.fsio import write_atomic
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.recovery import clone
from pgcdp.store.image import read_state
from pgcdp.store.layout import Store
from tests.fix_disks import MakeDisk
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet
from tests.json_shapes import INTERVAL, fits
from tests.spread import SPACES, place_of, spread_set
from tests.unit.test_store_alone import state_of
from tests.waiting import wait_until


@contextmanager
def clean_machine(found: ProtectedSet, copy: Path) -> Iterator[Path]:
    """Nothing of the set is there but a read-only copy of its store: a root of its own, and where it lies."""
    api.down(found.name)
    subprocess.run(["cp", "-a", found.store, copy], check=True)
    away = {place: place.with_name(place.name + ".away") for place in (found.store, found.root / "state")}
    before = os.environ["PGCDP_ROOT"]
    for place, to in away.items():
        place.rename(to)
    subprocess.run(["chown", "-R", "daemon", copy], check=True)
    subprocess.run(["mount", "--bind", "-o", "ro", copy, copy], check=True)
    root = found.root / "clean"
    root.mkdir()
    os.environ["PGCDP_ROOT"] = str(root)
    seen = state_of(copy)
    try:
        yield root
        assert state_of(copy) == seen
    finally:
        for each in clone.find_all(root):
            clone.destroy(each.place)
        os.environ["PGCDP_ROOT"] = before
        subprocess.run(["umount", copy], check=True)
        for place, to in away.items():
            to.rename(place)


def pgcdp(*words: str, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "pgcdp", *words, "--output", "json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == code, done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def started(found: ProtectedSet, place: Path) -> Iterator[psycopg.Connection[Any]]:
    user, sockets = postgres_user(), found.root / "beside"
    sockets.mkdir()
    os.chown(sockets, user.uid, user.gid)
    argv = cluster.command_line(found.binaries, place, "-c", f"unix_socket_directories={sockets}")
    cluster.start(argv, place, user, found.root / "restored.log")
    try:
        with psycopg.connect(host=str(sockets), port=5432, user="postgres", autocommit=True) as session:
            yield session
    finally:
        cluster.stop(place)


@pytest.mark.timeout(600)
def test_a_machine_that_has_only_a_copy(make_set: MakeSet, pg_binaries: Binaries) -> None:
    found = make_set(pg_binaries)
    found.sql("create table t as select n as id from generate_series(1, 1000) n")
    api.cut(found.name)
    found.sql("delete from t where id > 100")
    gone = api.cut(found.name)
    found.sql("insert into t select generate_series(2001, 2010)")
    last = api.cut(found.name)
    copy, place = found.root / "copy", found.root / "restored"
    with clean_machine(found, copy) as root:
        alone = ["--store", str(copy)]
        told = pgcdp("info", *alone)
        assert [fits(each, INTERVAL) for each in told["intervals"]] == [[]] * len(told["intervals"])
        assert told["intervals"][-1]["number"] >= last["number"]
        assert all(each["restorable_by_write"] for each in told["intervals"])
        assert pgcdp("verify", *alone)["ok"]
        assert pgcdp("verify", *alone, "--target-boundary", str(gone["number"]))["ok"]
        assert pgcdp("check", *alone, "--full")["ok"]
        made = pgcdp("clone", *alone, "--target-boundary", str(last["number"]), "--name", "alone")
        with psycopg.connect(made["dsn"]) as session:
            assert session.execute("select count(*) from t").fetchone() == (110,)
        pgcdp("destroy", "alone")
        pgcdp("restore", *alone, "--target-write", str(gone["to_write"]), "--to-directory", str(place))
        with started(found, place) as session:
            assert session.execute("select count(*) from t").fetchone() == (100,)
        assert sorted(path.name for path in root.iterdir()) == ["var"]
        assert sorted(path.name for path in (root / "var").iterdir()) == ["cache"]
    api.up(found.name)
    assert found.sql("select count(*) from t") == [(110,)]


@pytest.mark.timeout(600)
def test_a_copy_of_a_store_that_was_written_meanwhile(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """Its image is of before what it says: neither restored nor proven, and a copy behind `down` is."""
    found = make_set(pg_binaries)
    found.sql("create table t as select n as id from generate_series(1, 1000) n")
    first = api.cut(found.name)["number"]
    wait_until(lambda: read_state(Store.open(found.store)).boundary >= first, what="an image that has moved")
    mixed, place = found.root / "mixed", found.root / "restored"
    shutil.copytree(found.store / "image", mixed / "image")
    found.sql("delete from t where id > 100")
    last = api.cut(found.name)["number"]
    wait_until(lambda: read_state(Store.open(found.store)).boundary >= last, what="an image that has moved")
    api.down(found.name)
    whole = found.root / "whole"
    shutil.copytree(found.store, whole)
    shutil.copytree(found.store, mixed, ignore=shutil.ignore_patterns("*.img", "*.sums"), dirs_exist_ok=True)
    told = pgcdp("info", "--store", str(mixed))
    assert [each["lost"]["to_write"] for each in told["damages"]] == [None]
    pgcdp("verify", "--store", str(mixed), code=6)
    pgcdp("clone", "--store", str(mixed), "--name", "mixed", code=6)
    pgcdp("restore", "--store", str(mixed), "--to-directory", str(place), code=6)
    assert not place.exists()
    assert pgcdp("info", "--store", str(whole))["damages"] == []
    pgcdp("restore", "--store", str(whole), "--to-directory", str(place))
    with started(found, place) as session:
        assert session.execute("select count(*) from t").fetchone() == (100,)
    api.up(found.name)


@pytest.mark.timeout(600)
def test_three_volumes_from_a_copy(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf) -> None:
    """WAL on a volume of its own and tablespaces on two more: all of one moment."""
    found = spread_set(make_set, make_disk, binaries_of(15), settings={"autovacuum": "off"})
    with found.connect() as session:
        for name, other in (SPACES, SPACES[::-1]):
            session.execute(f"create table in_{name} (n int) tablespace {name}".encode())
            session.execute(f"insert into in_{name} select generate_series(1, 1000)".encode())
            session.execute(f"create unique index on in_{name} (n) tablespace {other}".encode())
    api.cut(found.name)
    places = [str(place_of(found, name)) for name in SPACES]
    copy, place = found.root / "copy", found.root / "restored"
    with clean_machine(found, copy):
        assert pgcdp("verify", "--store", str(copy))["ok"]
        told = pgcdp("restore", "--store", str(copy), "--to-directory", str(place))
        assert {each["name"] for each in told["tablespaces"]} == set(SPACES)
        assert not {each["directory"] for each in told["tablespaces"]} & set(places)
        with started(found, place) as session:
            for name in SPACES:
                assert session.execute(f"select count(*) from in_{name} where n > 0".encode()).fetchone() == (1000,)
                session.execute("set enable_seqscan = off")
    api.up(found.name)


@pytest.mark.timeout(600)
def test_the_agent_scrubs_and_says_what_it_found(make_set: MakeSet, pg_binaries: Binaries) -> None:
    found = make_set(pg_binaries, allowed=["scrub: "])
    found.sql("create table t as select n as id from generate_series(1, 1000) n")
    cut = api.cut(found.name)
    file = found.source().store.interval(cut["number"]) / "index"
    settings = found.config.paths.config_file
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes([whole[200] ^ 4]) + whole[201:])
    often = settings.read_text().replace('scrub_every = "7d"', 'scrub_every = "1s"')
    write_atomic(settings, often.encode())  # the agent may be reading it
    wait_until(lambda: api.status(found.name)["scrub"]["damages"] == 1, timeout=120, what="the agent has found it")
    told = api.info(found.name)
    assert [each["file"] for each in told["damages"]] == [str(file)]
    row = next(each for each in told["intervals"] if each["number"] == cut["number"])
    assert row["lost"] == [{"from_write": row["from_write"], "to_write": row["to_write"] - 1}]
    (failed,) = [each for each in api.check(found.name)["checks"] if not each["ok"]]
    assert (failed["name"], failed["kind"]) == ("scrub", "damage")
    refused = pgcdp("verify", "main", "--target-write", str(row["from_write"] + 1), code=5)["error"]
    assert f"{file} has a damaged frame at offset" in refused["message"]
    assert f"--target-boundary {cut['number'] - 1} " in refused["hint"]
    assert f"--target-boundary {cut['number']} " in refused["hint"]
    assert found.verify(row["to_write"])["ok"], "the boundary does not need it"
    file.write_bytes(whole)
    wait_until(lambda: api.status(found.name)["scrub"]["damages"] == 0, timeout=120, what="it is whole again")
    assert api.check(found.name, full=True)["ok"]
    assert api.info(found.name)["damages"] == []
    history = found.source().store.history
    assert any(f'"event": "{scrubbing.SCRUB}"' in path.read_text() for path in history.glob("*.json"))


def test_a_restored_cluster_without_its_configuration_starts_by_what_is_said(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """As Debian has it: what lies in /etc is in no volume, and its data_directory leads to production."""
    found = make_set(binaries_of(15))
    found.sql("create table t as select generate_series(1, 7) n")
    own, etc = found.pgdata / "postgresql.conf", found.root / "etc.conf"
    etc.write_text(own.read_text() + f"\ndata_directory = '{found.pgdata}'\nport = 5499\n")
    os.chown(etc, postgres_user().uid, postgres_user().gid)
    own.rename(found.pgdata / "away.conf")
    subprocess.run(["sync", "-f", found.pgdata], check=True)
    place = found.root / "restored"
    command = [sys.executable, "-P", "-m", "pgcdp", "restore", "--to-directory", str(place)]
    said = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True).stdout
    (found.pgdata / "away.conf").rename(own)
    assert "there is no postgresql.conf in it" in said
    (line,) = [each for each in said.splitlines() if "postgres -D" in each]
    words = line.split("postgres -D ")[1].replace("config_file=FILE", f"config_file={etc}")
    words = words.replace("hba_file=FILE", f"hba_file={place}/pg_hba.conf")
    cluster.start([str(found.binaries.path("postgres")), "-D", *words.split()], place, postgres_user())
    try:
        with psycopg.connect(f"host={found.sockets} port=5499 dbname=postgres user=postgres") as connection:
            assert connection.execute("select count(*), current_setting('data_directory') from t").fetchone() == (
                7,
                str(place),
            )
    finally:
        cluster.stop(place)
