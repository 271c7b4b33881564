"""One cluster on several volumes, disks and filesystems: every way back, with pg_wal and tablespaces where they belong.

What lies on different volumes must be of one and the same moment: a table in one tablespace, its index in another, the
WAL on a third volume.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from pgcdp import api, restoring
from pgcdp.capture import volumes
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.postgres import cluster
from pgcdp.records import Target
from pgcdp.recovery.salvage import Wanted
from tests.fix_disks import MakeDisk
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet
from tests.spread import SPACES, place_of, spread_set

pytestmark = pytest.mark.usefixtures("no_clone_stays")
Ask = Callable[[str], int]


def agreed(resolved: object) -> None:
    """Yes to everything."""


@pytest.fixture
def spread(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf) -> ProtectedSet:
    return spread_set(make_set, make_disk, binaries_of(15), settings={"autovacuum": "off"})


def fill(found: ProtectedSet) -> tuple[int, int]:
    """Two tables of 1000 rows, each in one tablespace with its index in the other; the writes before and behind it."""
    before = found.durable()
    with found.connect() as session:
        for name, other in (SPACES, SPACES[::-1]):
            session.execute(f"create table in_{name} (n int) tablespace {name}".encode())
            session.execute(f"insert into in_{name} select generate_series(1, 1000)".encode())
            session.execute(f"create unique index on in_{name} (n) tablespace {other}".encode())
    return before, found.durable()


def counts(connection: psycopg.Connection[tuple[int]]) -> list[int]:
    """Rows of both tables, by their heaps and by their indexes; [] when they are not there."""
    if connection.execute("select to_regclass('in_slow') is null").fetchone() == (True,):
        return []
    found = []
    for name in SPACES:
        for scan in ("on", "off"):
            connection.execute(f"set enable_seqscan = {scan}".encode())
            row = connection.execute(f"select count(*) from in_{name} where n > 0".encode()).fetchone()
            found += list(row or ())
    return found


@pytest.mark.parametrize("wal", ["a link", "inside"])
def test_every_way_back(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf, wal: str) -> None:
    """Also with a volume that is mounted inside of another, where a sandbox must keep it."""
    inside = wal == "inside"
    spread = spread_set(make_set, make_disk, binaries_of(15), settings={"autovacuum": "off"}, wal_inside=inside)
    _, full = fill(spread)
    spread.sql("delete from in_slow where n > 100")
    api.cut(spread.name)
    spread.sql("delete from in_fast where n > 10")
    now = spread.durable()
    spread.kill_engine()
    spread.up()
    with spread.connect() as session:
        assert counts(session) == [10, 10, 100, 100]

    # Seen without a copy, at points in intervals and behind.
    for target, rows in ((full, [1000] * 4), (now, [10, 10, 100, 100])):
        result = spread.verify(target)
        assert result["ok"], result
        made = api.clone(spread.name, Target("write", target), name="seen")
        with psycopg.connect(made["dsn"], autocommit=True) as session:
            assert counts(session) == rows
            session.execute("insert into in_fast select generate_series(2001, 2100)")
        api.step("seen", -1)
        api.step("seen", 1)
        with psycopg.connect(api.clones()["clones"][0]["dsn"]) as session:
            assert counts(session) == rows, "what was written to it is gone, also from the tablespaces"
        api.destroy("seen")
    told = api.salvage(spread.name, Target("newest"), Wanted(("in_slow",), None, None), before="delete from in_slow")
    assert told["tables"][0]["rows"] == 1000
    assert spread.sql("select count(*) from in_slow_salvaged") == [(1000,)]

    # Production itself, there and back.
    told = api.rewind(spread.name, Target("write", full), agree=agreed)
    assert told["verified"]
    with spread.connect() as session:
        assert counts(session) == [1000] * 4
    told = api.rewind(spread.name, Target("name", name=told["undo"]), agree=agreed)
    assert told["verified"]
    with spread.connect() as session:
        assert counts(session) == [10, 10, 100, 100]
    spread.amcheck()

    api.down(spread.name)
    spread.assert_volume_is_newest()
    api.up(spread.name)
    api.unprotect(spread.name)
    with spread.connect() as session:
        assert counts(session) == [10, 10, 100, 100]
    assert volumes.mounts_below(spread.root) == []
    if inside:
        assert not (spread.pgdata / "pg_wal").is_symlink()
    else:
        assert (spread.pgdata / "pg_wal").readlink() == place_of(spread, "wal")
    cluster.stop(spread.pgdata)


def test_a_restored_directory_has_its_own_of_everything(spread: ProtectedSet) -> None:
    """Started beside production, it must never open production's tablespaces: they bear the same files."""
    _, full = fill(spread)
    spread.sql("delete from in_slow where n > 100")
    api.cut(spread.name)
    target, place, chosen = Target("write", full), spread.root / "restored", spread.root / "chosen"
    api.cut(spread.name)
    with pytest.raises(UsageError, match='no tablespace "none"'):
        api.restore(spread.name, target, to_directory=place, tablespaces={"none": chosen})
    with pytest.raises(UsageError, match="is not empty"):
        api.restore(spread.name, target, to_directory=place, tablespaces={"fast": place_of(spread, "fast")})
    for given in ({"fast": chosen, "slow": chosen}, {"fast": place / "inside"}):
        with pytest.raises(UsageError, match="lie in each other"):
            api.restore(spread.name, target, to_directory=place, tablespaces=given)
    assert not place.exists()
    told = api.restore(spread.name, target, to_directory=place, tablespaces={"fast": chosen})
    oids = {where: oid for oid, where in cluster.tablespace_links(spread.pgdata).items()}
    fast, slow = (oids[place_of(spread, name)] for name in SPACES)
    beside = spread.root / "restored.tablespaces" / str(slow)
    assert told["tablespaces"] == [
        {"oid": fast, "name": "fast", "directory": str(chosen)},
        {"oid": slow, "name": "slow", "directory": str(beside)},
    ]
    assert (place / "pg_wal").is_dir()
    assert not (place / "pg_wal").is_symlink()
    assert cluster.tablespace_links(place) == {fast: chosen, slow: beside}
    assert not list(spread.root.glob("**/lost+found"))
    user, sockets = postgres_user(), spread.root / "beside"
    sockets.mkdir()
    os.chown(sockets, user.uid, user.gid)
    argv = cluster.command_line(spread.binaries, place, "-c", f"unix_socket_directories={sockets}")
    cluster.start(argv, place, user, spread.root / "restored.log")
    try:
        with psycopg.connect(host=str(sockets), port=5432, user="postgres", autocommit=True) as session:
            assert counts(session) == [1000] * 4
            session.execute("delete from in_fast")
    finally:
        cluster.stop(place)
    with spread.connect() as session:
        assert counts(session) == [1000, 1000, 100, 100]
    with pytest.raises(UsageError, match=r"restored\.tablespaces exists"):
        api.restore(spread.name, target, to_directory=spread.root / "restored")


def test_images_mount_beside_production(spread: ProtectedSet) -> None:
    """An xfs of the same UUID is refused by the kernel unless it is told (nouuid)."""
    fill(spread)
    place = spread.root / "images"
    api.restore(spread.name, Target("newest"), to_image=place)
    assert sorted(path.name for path in place.iterdir()) == ["data.img", "ts-fast.img", "ts-slow.img", "wal.img"]
    mountpoint = spread.root / "mnt"
    mountpoint.mkdir()
    subprocess.run(["mount", "-o", "loop,nouuid", place / "ts-slow.img", mountpoint], check=True)
    assert next(mountpoint.glob("PG_15_*")).is_dir()
    volumes.unmount(mountpoint)


def no_programs(*named: object) -> None:
    raise PreconditionError("no programs", "install them")


def test_a_tablespace_made_anew_in_its_place(spread: ProtectedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery that replays CREATE TABLESPACE links to production's directory again, whatever the link was before."""
    api.cut(spread.name)
    spread.sql("drop tablespace fast")
    spread.sql(f"create tablespace again location '{place_of(spread, 'fast')}'")
    spread.sql("create table t tablespace again as select generate_series(1, 1000) as n")
    point = spread.durable()
    seen = [path.name for path in place_of(spread, "fast").rglob("*")]
    with spread.running_at(Target("write", point)) as box, box.connect() as session:
        assert session.execute("select count(*) from t").fetchone() == (1000,)
        session.execute("insert into t select generate_series(1, 100000)")
        session.execute("checkpoint")
    assert [path.name for path in place_of(spread, "fast").rglob("*")] == seen
    assert spread.sql("select count(*) from t") == [(1000,)]
    with pytest.raises(PreconditionError, match=r"makes tablespace \d+ in .*/fast, production's own:"):
        api.restore(spread.name, Target("write", point), to_directory=spread.root / "restored")
    with monkeypatch.context() as without:
        without.setattr(restoring, "binaries_of", no_programs)
        with pytest.raises(PreconditionError, match="is not known: PostgreSQL of its version is not found"):
            api.restore(spread.name, Target("write", point), to_directory=spread.root / "restored")
    assert not (spread.root / "restored").exists()
    api.cut(spread.name)
    api.restore(spread.name, Target("newest"), to_directory=spread.root / "restored")


def test_show_calls_files_as_the_cluster_does(spread: ProtectedSet) -> None:
    """A write to a tablespace's volume is a page of a table, not a file somewhere."""
    before, _ = fill(spread)
    api.cut(spread.name)
    api.cut(spread.name)
    names: dict[str, set[str]] = {}
    interval = spread.source().intervals()[-2]
    for write in range(max(before, interval.from_write), interval.to_write + 1):
        shown = api.show(spread.name, write)
        for file in shown["holds"].get("files", ()):
            if file["relation"]:
                names.setdefault(shown["volume"], set()).add(file["relation"]["name"])
            if shown["volume"] == "wal" and file["file"]:
                assert file["file"].startswith("pg_wal/")
    assert {"in_fast", "in_slow_n_idx"} <= names["ts-fast"]
    assert {"in_slow", "in_fast_n_idx"} <= names["ts-slow"]


def test_typed_as_people_type_it(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Wrong words are exit 2 with a hint, and change nothing."""
    found = make_set(binaries_of(15), protect=False)
    words = ["protect", "main", "--pgdata", str(found.pgdata), "--store", str(found.store), "--size", "1G"]
    for more, told in (
        (["--wal-volume", "much"], "neither a block device nor a size"),
        (["--tablespace", "fast"], "names no tablespace and its volume"),
        (["--fs", "zfs"], "no filesystem"),
        (["--tablespace", "fast=1G", "--initdb"], "a new cluster has no tablespaces"),
    ):
        done = subprocess.run(
            ["pgcdp", *words, *more, "--yes", "--output", "json"], check=False, capture_output=True, text=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        error = json.loads(done.stdout or done.stderr)["error"]
        assert (done.returncode, error["kind"]) == (2, "usage"), done
        assert told in error["message"]
        assert error["hint"]
