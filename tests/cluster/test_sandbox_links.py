"""The sandbox follows no link, tablespace or file of the image to a place that is production's."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest

from pgcdp import proc
from pgcdp.capture.volumes import loop_backing
from pgcdp.errors import PreconditionError, VerificationFailed
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.recovery import sandbox
from tests.fix_postgres import MakeCluster
from tests.sandboxed import fingerprint, value
from tests.waiting import wait_until


def test_writes_nothing_outside(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """Even a superuser's SQL: files, programs, the production directory, other processes' sockets, the network."""
    live = make_cluster(pg_binaries)
    witness = place / "copy-witness"
    witness.mkdir()
    witness.chmod(0o777)
    copy = live.crash_copy(place / "copy")
    with sandbox.start(copy, live.settings(), parent=place) as box, box.connect() as connection:
        for statement in (
            f"copy (select 1) to '{witness}/file'",
            f"copy (select 1) to program 'cat > {witness}/program'",
            f"copy (select 1) to program 'rm {live.pgdata}/PG_VERSION'",
            "copy (select 1) to '/dev/shm/../../tmp/pgcdp-witness'",
        ):
            with pytest.raises(psycopg.Error, match=r"Read-only file system|could not|failed"):
                connection.execute(statement.encode())
        with pytest.raises(psycopg.Error, match=r"Permission denied|No such file"):
            connection.execute("select pg_ls_dir(%s)", [str(live.pgdata)])
        connection.execute("create temp table links (line text)")
        connection.execute("copy links from program 'cut -d: -f1 /proc/net/dev | tail -n +3'")
        assert [row[0].strip() for row in connection.execute("select line from links order by 1")][-1:] == ["lo"]
        with pytest.raises(psycopg.Error):
            connection.execute("copy links from program 'exec 3<>/dev/tcp/192.0.2.1/80'")
        # what is its own it may write
        connection.execute(f"copy (select 1) to '{box.scratch}/own'".encode())
    assert list(witness.iterdir()) == []
    assert (live.pgdata / "PG_VERSION").exists()


@pytest.mark.parametrize("with_settings", [True, False], ids=["settings", "running"])
def test_production_cannot_be_reached_by_its_socket(
    pg15: Binaries, make_cluster: MakeCluster, place: Path, with_settings: bool
) -> None:
    """A socket with a path is in no network namespace: neither a foreign server nor a program gets through one."""
    shared = Path(tempfile.mkdtemp(prefix="pgcdp-socket-", dir="/tmp"))
    shared.chmod(0o777)
    live = make_cluster(pg15, start=False)
    try:
        live.start("-c", f"unix_socket_directories={live.sockets},{shared}")
        live.sql("create extension dblink")
        copy = live.crash_copy(place / "copy")
        settings = live.settings() if with_settings else None
        with sandbox.start(copy, settings, parent=place) as box, box.connect() as connection:
            own = f"host={box.socket_directory} user=postgres dbname=postgres"
            reached = "select * from dblink(%s, 'select 1') as t(n int)"
            assert connection.execute(reached, [own]).fetchone() == (1,), "its own is there"
            for directory in (live.sockets, shared):
                assert (directory / ".s.PGSQL.5432").exists()
                with pytest.raises(psycopg.Error, match="could not establish connection"):
                    connection.execute(reached, [f"host={directory} user=postgres dbname=postgres"])
                command = f"{pg15.path('psql')} -h {directory} -U postgres -c 'create table escaped (n int)'"
                with pytest.raises(psycopg.Error, match="failed"):
                    connection.execute(f"copy (select 1) to program $$ {command} $$".encode())
        assert live.sql("select to_regclass('escaped')::text") == [(None,)]
    finally:
        shutil.rmtree(shared)


def test_tablespace_made_inside_the_replay(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """Replaying CREATE TABLESPACE names production's directory again: it must not be touched."""
    live = make_cluster(pg_binaries)
    space = live.own_directory("space")
    live.sql("checkpoint")
    base = live.crash_copy(place / "copy")
    live.sql(f"create tablespace elsewhere location '{space}'")
    live.sql("create table t tablespace elsewhere as select generate_series(1, 1000) as n")
    # The image before the statement, with the WAL after it.
    shutil.rmtree(base / "pg_wal")
    proc.run(["cp", "-a", str(live.pgdata / "pg_wal"), str(base / "pg_wal")])
    before = fingerprint(space)
    assert before != {}
    settings = live.settings()
    settings["tablespaces"] = []  # it came after the settings were kept
    with pytest.raises(VerificationFailed, match=r"space"):
        sandbox.start(base, settings, parent=place)
    assert fingerprint(space) == before
    assert live.sql("select count(*) from t") == [(1000,)]


def test_links_lead_to_its_own_places(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries, start=False)
    space, wal = live.own_directory("space"), live.root / "wal"
    shutil.move(live.pgdata / "pg_wal", wal)
    (live.pgdata / "pg_wal").symlink_to(wal)
    live.start()
    live.sql(f"create tablespace elsewhere location '{space}'")
    live.sql("create table t tablespace elsewhere as select generate_series(1, 1000) as n")
    live.sql("checkpoint")
    settings = live.settings()
    found = cluster.inspect(live.pgdata)
    assert found.wal_link == wal
    assert list(found.tablespaces.values()) == [space]
    live.stop()
    copy = live.crash_copy(place / "copy")
    own = {wal: place / "copy-wal", space: place / "copy-space"}
    for source, target in zip((wal, space), own.values(), strict=True):
        proc.run(["cp", "-a", str(source), str(target)])
    before = fingerprint(wal), fingerprint(space)

    with pytest.raises(PreconditionError, match="not part of what was restored"):
        sandbox.start(copy, settings, parent=place)
    assert (copy / "pg_wal").readlink() == wal, "nothing was changed"

    with sandbox.start(copy, settings, parent=place, elsewhere=own) as box:
        assert (copy / "pg_wal").readlink() == place / "copy-wal"
        assert value(box, "select count(*) from t") == 1000
        with box.connect() as connection:
            connection.execute("update t set n = n + 1")
            connection.execute("checkpoint")
        box.stop()
    assert (fingerprint(wal), fingerprint(space)) == before


@pytest.mark.parametrize("replayed", [False, True])
def test_a_relations_file_that_lies_elsewhere_is_refused_and_not_written(
    pg_binaries: Binaries, make_cluster: MakeCluster, place: Path, replayed: bool
) -> None:
    live = make_cluster(pg_binaries)
    live.sql("create table t as select generate_series(1, 1000) as n")
    live.sql("checkpoint")
    if replayed:  # recovery opens the file, and cannot write through the link
        live.sql("update t set n = n + 1")
    [(file,)] = live.sql("select pg_relation_filepath('t')")
    copy, elsewhere = live.crash_copy(place / "copy"), place / "copy-elsewhere"
    shutil.move(copy / file, elsewhere)
    (copy / file).symlink_to(elsewhere)
    before = elsewhere.read_bytes()

    with pytest.raises(PreconditionError, match=f"{file} leads to {elsewhere}, which is not part of what was restored"):
        sandbox.start(copy, live.settings(), parent=place)
    assert elsewhere.read_bytes() == before
    assert cluster.find_postmaster(copy) is None


@pytest.mark.parametrize("replayed", [False, True])
def test_a_relations_file_on_another_volume_is_led_there(
    pg_binaries: Binaries, make_cluster: MakeCluster, place: Path, replayed: bool
) -> None:
    """... also where the machine has no such path: looked for while Postgres starts, which may need it before."""
    live = make_cluster(pg_binaries)
    live.sql("create table t as select generate_series(1, 1000) as n")
    live.sql("checkpoint")
    if replayed:
        live.sql("update t set n = n + 1")
    [(file,)] = live.sql("select pg_relation_filepath('t')")
    copy, own = live.crash_copy(place / "copy"), place / "copy-other"
    proc.run(["install", "-d", "-o", live.user.name, "-m", "700", str(own)])
    shutil.move(copy / file, own / "moved")
    (copy / file).symlink_to("/nowhere/of/production/moved")
    elsewhere = {Path("/nowhere/of/production"): own}
    with sandbox.start(copy, live.settings(), parent=place, elsewhere=elsewhere) as box:
        assert value(box, "select count(*) from t") == 1000
        assert value(box, "select max(n) from t") == (1001 if replayed else 1000)
        assert (copy / file).readlink() == own / "moved"
        assert box.recovery.warnings == ()


def test_a_link_in_place_of_a_file_is_not_written_through(
    pg15: Binaries, make_cluster: MakeCluster, place: Path
) -> None:
    live = make_cluster(pg15)
    copy = live.crash_copy(place / "copy")
    for name in ("postgresql.auto.conf", "postmaster.pid"):
        target = place / f"copy-{name}"
        target.write_text("# precious\n")
        (copy / name).unlink()
        (copy / name).symlink_to(target)
    with sandbox.start(copy, live.settings(), parent=place) as box:
        box.stop()
    assert {(place / f"copy-{name}").read_text() for name in ("postgresql.auto.conf", "postmaster.pid")} == {
        "# precious\n"
    }


def test_keeps_no_hold_of_other_mounts(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """While it runs, a loop device that was mounted when it started can be unmounted and is then really free."""
    live = make_cluster(pg15)
    copy = live.crash_copy(place / "copy")
    image, point = place / "copy-image", place / "copy-point"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    proc.run(["mkfs.ext4", "-q", str(image)])
    device = proc.run(["losetup", "--find", "--show", str(image)]).stdout.strip()
    try:
        proc.run(["mount", device, str(point)])
        try:
            with sandbox.start(copy, live.settings(), parent=place) as box:
                proc.run(["umount", str(point)])
                proc.run(["losetup", "--detach", device])
                # Free, or another test's already.
                wait_until(lambda: loop_backing(Path(device)) != image, timeout=5, what="detached loop device")
                assert value(box, "select 1") == 1
        finally:
            subprocess.run(["umount", "-q", str(point)], check=False)
    finally:
        if loop_backing(Path(device)) == image:
            subprocess.run(["losetup", "--detach", device], check=False)
