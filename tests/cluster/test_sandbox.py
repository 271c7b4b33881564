"""The sandbox touches nothing outside itself and believes no configuration of the image, one property at a time."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcdp import proc
from pgcdp.errors import PreconditionError, VerificationFailed
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.recovery import sandbox
from pgcdp.recovery.sandbox import Sandbox
from tests.fix_postgres import BindirOf, MakeCluster, postgres_user
from tests.waiting import wait_until


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that user postgres may enter; it must be empty but for `copy*` when the test ends."""
    path = Path(tempfile.mkdtemp(prefix="pgcdp-place-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    left = sorted(each.name for each in path.iterdir() if not each.name.startswith("copy"))
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(path) in line]
    shutil.rmtree(path)
    assert (left, mounts) == ([], [])


@pytest.fixture
def pg15(binaries_of: BindirOf) -> Binaries:
    return binaries_of(15)


def fingerprint(directory: Path) -> dict[str, str]:
    """Every file below a directory with its content's hash."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }


def shown(box: Sandbox, name: str) -> str:
    with box.connect() as connection:
        row = connection.execute("select current_setting(%s)", [name]).fetchone()
    assert row is not None
    return str(row[0])


def value(box: Sandbox, statement: str, database: str = "postgres") -> Any:
    with box.connect(database) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return None if row is None else row[0]


def test_recovers_and_says_what_it_did(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries)
    live.sql("create table t as select generate_series(1, 10000) as n")
    redo = live.control().redo_lsn
    copy = live.crash_copy(place / "copy")
    live.sql("insert into t values (0)")
    with sandbox.start(copy, live.settings(), parent=place) as box:
        assert value(box, "select count(*) from t") == 10000
        assert box.recovery.from_lsn is not None
        assert box.recovery.to_lsn is not None
        # Postgres names the first record that it replays: the one behind a shutdown checkpoint's own.
        assert redo <= box.recovery.from_lsn < redo + 512 < box.recovery.to_lsn
        assert box.recovery.warnings == ()
        assert value(box, "select pg_is_in_recovery()") is False, "it takes writes"
        live.sql("insert into t values (1)")
        assert value(box, "select count(*) from t") == 10000
        box.stop()
        with sandbox.start(copy, None, parent=place) as again:
            assert (again.recovery.from_lsn, again.recovery.to_lsn) == (None, None)
    assert live.sql("select count(*) from t") == [(10002,)]


@pytest.mark.parametrize("file", ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"])
def test_nul_bytes_in_a_configuration_file(pg15: Binaries, make_cluster: MakeCluster, place: Path, file: str) -> None:
    live = make_cluster(pg15)
    copy = live.crash_copy(place / "copy")
    with (copy / file).open("ab") as stream:
        stream.write(bytes(4096))
    with sandbox.start(copy, live.settings(), parent=place) as box:
        assert value(box, "select 1") == 1


def test_nul_bytes_stop_a_plain_start(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """What the sandbox is spared: the very same image does not start with its own configuration."""
    live = make_cluster(pg15)
    copy = live.crash_copy(place / "copy")
    with (copy / "postgresql.conf").open("ab") as stream:
        stream.write(bytes(4096))
    (copy / "postmaster.pid").unlink()
    with pytest.raises(PreconditionError, match="syntax error"):
        cluster.start(cluster.command_line(pg15, copy), copy, postgres_user(), place / "copy.log")


def test_data_directory_that_names_production(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries)
    live.sql("checkpoint")
    copy = live.crash_copy(place / "copy")
    for file in ("postgresql.conf", "postgresql.auto.conf"):
        with (copy / file).open("a") as stream:
            stream.write(f"data_directory = '{live.pgdata}'\nhba_file = '{live.pgdata}/pg_hba.conf'\n")
            stream.write(f"unix_socket_directories = '{live.sockets}'\nexternal_pid_file = '{live.sockets}/pid'\n")
    before = {name: (live.pgdata / name).read_bytes() for name in ("postmaster.pid", "global/pg_control")}
    with sandbox.start(copy, live.settings(), parent=place) as box:
        assert shown(box, "data_directory") == str(copy)
        assert shown(box, "hba_file") == str(box.scratch / "pg_hba.conf")
        assert shown(box, "config_file") == str(box.scratch / "postgresql.conf")
        assert (copy / "postgresql.auto.conf").read_bytes() == b""
        box.stop()
    assert {name: (live.pgdata / name).read_bytes() for name in before} == before
    assert not (live.sockets / "pid").exists()
    assert live.sql("select 1") == [(1,)]


def test_archives_restores_and_streams_nothing(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    witness = place / "copy-witness"
    witness.mkdir()
    witness.chmod(0o777)
    live = make_cluster(pg_binaries)
    copy = live.crash_copy(place / "copy")
    for file in ("postgresql.conf", "postgresql.auto.conf"):
        with (copy / file).open("a") as stream:
            stream.write("archive_mode = 'always'\n")
            stream.write(f"primary_conninfo = 'host={live.sockets} application_name=escaped'\n")
            stream.write("synchronous_standby_names = 'nobody'\n")
            for name in ("archive_command", "restore_command", "archive_cleanup_command", "recovery_end_command"):
                stream.write(f"{name} = 'touch {witness}/{name}'\n")
    for name in ("standby.signal", "recovery.signal", "backup_label", "tablespace_map"):
        (copy / name).write_text("")
    with sandbox.start(copy, live.settings(), parent=place) as box:
        assert value(box, "select pg_is_in_recovery()") is False
        with box.connect() as connection:  # a commit would wait for ever for a synchronous standby
            connection.execute("create table t (n int)")
            connection.execute("select pg_switch_wal()")
            connection.execute("checkpoint")
        assert shown(box, "archive_mode") == "off"
        assert value(box, "select count(*) from pg_stat_wal_receiver") == 0
        box.stop()
    assert list(witness.iterdir()) == []
    assert not any((copy / name).exists() for name in ("standby.signal", "recovery.signal", "backup_label"))


@pytest.mark.parametrize("with_settings", [True, False], ids=["settings", "pg_control alone"])
def test_pending_prepared_transaction(
    pg_binaries: Binaries, make_cluster: MakeCluster, place: Path, with_settings: bool
) -> None:
    live = make_cluster(pg_binaries, max_prepared_transactions="5", max_connections="37")
    live.sql("create table t (n int)")
    with live.connect() as connection:
        connection.execute("begin")
        connection.execute("insert into t values (1)")
        connection.execute("prepare transaction 'pending'")
    copy = live.crash_copy(place / "copy")
    with sandbox.start(copy, live.settings() if with_settings else None, parent=place) as box:
        assert value(box, "select gid from pg_prepared_xacts") == "pending"
        for name, wanted in {"max_prepared_transactions": "5", "max_connections": "37"}.items():
            assert shown(box, name) == wanted
        with box.connect() as connection:
            connection.execute("commit prepared 'pending'")
        assert value(box, "select n from t") == 1
    assert live.sql("select gid from pg_prepared_xacts") == [("pending",)]
    live.sql("rollback prepared 'pending'")


def test_limits_that_grew_after_the_settings_were_kept(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15, max_prepared_transactions="1")
    old = live.settings()
    live.stop()
    live.configure(max_prepared_transactions="9")
    live.start()
    with live.connect() as connection:
        for number in range(5):
            connection.execute("begin")
            connection.execute(f"prepare transaction 'p{number}'".encode())
    copy = live.crash_copy(place / "copy")
    with sandbox.start(copy, old, parent=place) as box:
        assert value(box, "select count(*) from pg_prepared_xacts") == 5


def test_slots_and_subscriptions(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """A logical slot needs wal_level = logical to start at all; a subscription must not fetch from its publisher."""
    live = make_cluster(
        pg_binaries, wal_level="logical", max_replication_slots="3", max_logical_replication_workers="0"
    )
    live.sql("select pg_create_logical_replication_slot('slot', 'pgoutput')")
    live.sql("create publication p for all tables")
    conninfo = f"host={live.sockets} port=5432 user=postgres dbname=postgres"
    live.sql(f"create subscription s connection '{conninfo}' publication p with (connect = false, slot_name = 'slot')")
    live.allowed += ["subscription was created, but is not connected", "tables were not subscribed"]
    live.sql("alter subscription s enable")
    copy = live.crash_copy(place / "copy")
    with sandbox.start(copy, live.settings(), parent=place) as box:
        assert value(box, "select slot_name from pg_replication_slots") == "slot"
        assert value(box, "select subenabled from pg_subscription") is True
        assert shown(box, "max_logical_replication_workers") == "0"
        assert value(box, "select count(*) from pg_stat_activity where backend_type like 'logical replication%'") == 0
    assert live.sql("select active from pg_replication_slots") == [(False,)]
    live.sql("alter subscription s disable")
    live.sql("alter subscription s set (slot_name = none)")
    live.sql("drop subscription s")


def test_libraries_and_bent_roles(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """Neither preloaded libraries nor what ALTER ROLE and ALTER DATABASE set keep the checks from running."""
    live = make_cluster(pg_binaries)
    with live.connect() as connection:
        connection.execute("create role nobody_special")
        for setting in ("default_transaction_read_only = on", "search_path = nowhere", "role = nobody_special"):
            connection.execute(f"alter role postgres set {setting}".encode())
        connection.execute("alter database postgres set session_preload_libraries = 'no_such_library'")
    with pytest.raises(psycopg.Error, match="no_such_library"):
        live.connect()
    live.allowed += ["no_such_library"]
    copy = live.root / "copy"
    live.crash_copy(copy)
    settings_text = "shared_preload_libraries = 'pg_cron,no_such_library'\n"
    (copy / "postgresql.conf").write_text(settings_text)
    (copy / "postgresql.auto.conf").write_text(settings_text)
    with sandbox.start(copy, None, parent=place) as box:
        assert shown(box, "shared_preload_libraries") == ""
        with box.connect() as connection:
            connection.execute("create table public.t (n int)")
            assert connection.execute("select current_user").fetchone() == ("postgres",)


def test_only_its_owner_reaches_it(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15)
    copy = live.crash_copy(place / "copy")
    (copy / "postgresql.conf").write_text("listen_addresses = '*'\nport = 54399\nssl = on\n")
    with sandbox.start(copy, live.settings(), parent=place) as box:
        assert stat.S_IMODE(box.socket_directory.stat().st_mode) == 0o700
        assert box.socket_directory.stat().st_uid == postgres_user().uid
        assert shown(box, "listen_addresses") == ""
        tcp = value(box, "select count(*) from pg_stat_activity where client_addr is not null")
        assert tcp == 0
        nobody = proc.user_named("nobody")
        program = [str(pg15.path("psql")), "-h", str(box.socket_directory), "-U", "postgres", "-c", "select 1"]
        assert "Permission denied" in proc.run(program, user=nobody, check=False).stderr
        assert proc.run(program, user=postgres_user(), check=False).returncode == 0


def test_takes_little_of_the_machine(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries)
    copy = live.crash_copy(place / "copy")
    huge = "shared_buffers = '64TB'\nhuge_pages = on\nlogging_collector = on\nlog_directory = '/var/tmp'\n"
    (copy / "postgresql.auto.conf").write_text(huge)
    settings = live.settings()
    settings["settings"].append({"name": "shared_buffers", "setting": "8589934592"})
    with sandbox.start(copy, settings, parent=place) as box:
        wanted = {"shared_buffers": "128MB", "huge_pages": "off", "logging_collector": "off", "fsync": "off"}
        assert {name: shown(box, name) for name in wanted} == wanted


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
    space = live.root / "space"
    space.mkdir()
    os.chown(space, live.user.uid, live.user.gid)
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
    space, wal = live.root / "space", live.root / "wal"
    space.mkdir()
    os.chown(space, live.user.uid, live.user.gid)
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
                backing = Path(f"/sys/block/{Path(device).name}/loop/backing_file")
                wait_until(lambda: not backing.exists(), timeout=5, what="detached loop device")
                assert value(box, "select 1") == 1
        finally:
            subprocess.run(["umount", "-q", str(point)], check=False)
    finally:
        subprocess.run(["losetup", "--detach", device], check=False, stderr=subprocess.DEVNULL)


def test_destroy_leaves_nothing(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries)
    copy = live.crash_copy(place / "copy")
    box = sandbox.start(copy, live.settings(), parent=place, owns_data=True)
    open_session = box.connect()
    open_session.execute("create table t as select generate_series(1, 100000)")
    postmaster = cluster.find_processes(copy)[0]
    # Shared memory: its segments lie where only its own namespaces see them, and go with these.
    assert os.readlink(f"/proc/{postmaster}/ns/ipc") != os.readlink("/proc/self/ns/ipc")
    segments = set(os.listdir(f"/proc/{postmaster}/root/dev/shm"))
    assert segments - set(os.listdir("/dev/shm")) == segments != set()
    box.destroy()
    open_session.close()
    assert cluster.find_processes(copy) == []
    assert list(place.iterdir()) == [], "scratch, socket and its own data are gone"
    assert not segments & set(os.listdir("/dev/shm"))
    box.destroy()


def test_long_paths(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """A socket's path is at most 107 bytes; its directory is then made elsewhere, and is gone in the end."""
    live = make_cluster(pg15)
    deep = place / "copy-deep" / ("d" * 120)
    deep.mkdir(parents=True)
    copy = live.crash_copy(place / "copy")
    with sandbox.start(copy, live.settings(), parent=deep) as box:
        assert value(box, "select 1") == 1
        sockets = box.socket_directory
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert not sockets.exists()
    assert list(deep.iterdir()) == []


def test_refuses_what_is_not_a_copy(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15)
    before = fingerprint(live.pgdata)
    with pytest.raises(PreconditionError, match="a sandbox needs a copy of its own"):
        sandbox.start(live.pgdata, live.settings(), parent=place)
    with pytest.raises(PreconditionError, match="not a data directory"):
        sandbox.start(place, None, parent=place)
    copy = live.crash_copy(place / "copy")
    os.chown(copy, 0, 0)
    with pytest.raises(PreconditionError, match="belongs to root"):
        sandbox.start(copy, None, parent=place)
    assert set(before) <= set(fingerprint(live.pgdata))
    assert live.sql("select 1") == [(1,)]


def test_a_place_its_owner_cannot_enter(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg15)
    closed = place / "copy-closed"
    closed.mkdir(mode=0o700)
    copy = live.crash_copy(closed / "data")
    with pytest.raises(PreconditionError, match="user postgres cannot enter"):
        sandbox.start(copy, live.settings(), parent=place)
    assert (copy / "postmaster.pid").exists(), "nothing was changed"


def test_a_recovery_that_fails(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    live = make_cluster(pg_binaries)
    copy = live.crash_copy(place / "copy")
    for segment in (copy / "pg_wal").glob("0*"):
        segment.unlink()
    with pytest.raises(VerificationFailed, match=r"could not locate a valid checkpoint record|checkpoint record"):
        sandbox.start(copy, live.settings(), parent=place, owns_data=True)
    assert copy.exists(), "what cannot be started is not thrown away"
    assert cluster.find_processes(copy) == []
