"""The sandbox touches nothing outside itself and believes no configuration of the image, one property at a time."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from pgcdp import proc
from pgcdp.errors import PreconditionError, VerificationFailed
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.recovery import sandbox
from tests.fix_postgres import MakeCluster, postgres_user
from tests.sandboxed import fingerprint, shown, value
from tests.waiting import wait_until


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


def titles(pgdata: Path) -> str:
    """What the processes of a cluster call themselves."""
    found = []
    for pid in cluster.find_processes(pgdata):
        with suppress(OSError):  # it has ended
            found.append(Path(f"/proc/{pid}/cmdline").read_text())
    return "\n".join(found)


def test_a_preloaded_library_has_no_worker(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """One that does something by itself, as pg_cron does, would do it twice: in production and in each clone."""
    live = make_cluster(pg_binaries, shared_preload_libraries="pg_prewarm")
    wait_until(lambda: "autoprewarm leader" in titles(live.pgdata), what="production has one")
    copy = live.crash_copy(place / "copy")
    dumped = (copy / "autoprewarm.blocks").exists()
    with sandbox.start(copy, live.settings(), parent=place) as box:
        assert shown(box, "shared_preload_libraries") == ""
        assert "checkpointer" in titles(copy)
        assert "autoprewarm" not in titles(copy)
        own = {"autovacuum launcher", "background writer", "checkpointer", "client backend", "io worker", "walwriter"}
        with box.connect() as connection:
            running = {row[0] for row in connection.execute("select backend_type from pg_stat_activity")}
        assert running <= own
        box.stop()
    assert (copy / "autoprewarm.blocks").exists() == dumped


def test_its_log_goes_to_its_own_place(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """Not among production's, whose files its lines would look like, and not to the machine's syslog."""
    logs = place / "copy-logs"
    logs.mkdir()
    shutil.chown(logs, "postgres")
    hostile = {
        "logging_collector": "on",
        "log_directory": str(logs),
        "log_filename": "production.log",
        "log_destination": "stderr,csvlog,syslog",
        "log_statement": "all",
        "log_file_mode": "0666",
        "log_truncate_on_rotation": "on",
    }
    live = make_cluster(pg_binaries)
    copy = live.crash_copy(place / "copy")
    for file in ("postgresql.conf", "postgresql.auto.conf"):
        with (copy / file).open("a") as stream:
            stream.writelines(f"{name} = '{setting}'\n" for name, setting in hostile.items())
    settings = live.settings()
    settings["settings"] += [
        {"name": name, "setting": setting, "context": "sighup", "source": "configuration file"}
        for name, setting in hostile.items()
    ]
    with sandbox.start(copy, settings, parent=place) as box:
        assert value(box, "select 'a statement'") == "a statement"
        assert {name: shown(box, name) for name in ("log_destination", "logging_collector", "log_statement")} == {
            "log_destination": "stderr",
            "logging_collector": "off",
            "log_statement": "none",
        }
        with box.connect() as connection, pytest.raises(psycopg.Error):
            connection.execute("do $$ begin raise log 'told in the log'; perform 1 / 0; end $$")
        box.stop()
        assert "shut down" in box.log_file.read_text()
    assert list(logs.iterdir()) == []
    assert not (copy / "log").exists()


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


def test_sessions_are_as_in_production(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """A statement that reads a date, the time zone or the planner's mind answers as it did there."""
    kept = {
        "TimeZone": "Pacific/Auckland",
        "DateStyle": "SQL, DMY",
        "default_text_search_config": "pg_catalog.german",
        "enable_seqscan": "off",
        "work_mem": "7MB",
        "random_page_cost": "1.1",
        "default_transaction_isolation": "repeatable read",
        "statement_timeout": "1h",
        "shop.tenant": "a'b\\c",
        "search_path": 'shop, "$user", public',
    }
    other = {
        "default_transaction_read_only": "on",
        "log_min_duration_statement": "0",
        "shared_buffers": "1MB",
        "temp_tablespaces": "gone",
        "jit_provider": "no_such_library",
    }
    live = make_cluster(pg_binaries)
    live.stop()
    with (live.pgdata / "postgresql.conf").open("a") as stream:
        for name, wanted in (kept | other).items():
            quoted = wanted.replace("\\", "\\\\").replace("'", "''")
            stream.write(f"{name} = '{quoted}'\n")
    live.start()
    settings = live.settings()
    live.sql("checkpoint")
    copy = live.crash_copy(place / "copy")
    with sandbox.start(copy, settings, parent=place) as box:
        with psycopg.connect(box.dsn()) as plain:
            found = {name: plain.execute("select current_setting(%s)", [name]).fetchone() for name in kept | other}
        assert {name: found[name] for name in kept} == {name: (wanted,) for name, wanted in kept.items()}
        assert found["default_transaction_read_only"] == ("off",)
        assert found["shared_buffers"] == ("128MB",)
        assert found["temp_tablespaces"] == ("",)
        assert found["log_min_duration_statement"] == ("-1",)
        assert found["jit_provider"] == ("llvmjit",)
        assert box.recovery.defaults == ()
        for name, wanted in {"DateStyle": "ISO, DMY", "statement_timeout": "0", "search_path": "public"}.items():
            assert shown(box, name) == wanted, "pgcdp's own sessions read values in one format"


def test_settings_that_postgres_refuses_here(pg_binaries: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """A locale that only production's machine has keeps its backup from nothing; and no secret comes in."""
    live = make_cluster(pg_binaries, TimeZone="Pacific/Auckland")
    settings = live.settings()
    row = {"unit": None, "vartype": "string", "context": "user", "source": "configuration file"}
    settings["settings"] += [
        {**row, "name": "lc_monetary", "setting": "xx_XX.nowhere"},
        {**row, "name": "timezone_abbreviations", "setting": "Elsewhere"},
        {**row, "name": "no_setting_of_this_version", "setting": "on"},
        {**row, "name": "shop.note", "setting": "two\nlines"},
        {**row, "name": "a.b.c", "setting": "no name for a file"},
        {**row, "name": "anon.salt", "setting": "secret", "context": "superuser"},
        {**row, "name": "bytea_output", "setting": "escape", "source": "user"},
    ]
    copy = live.crash_copy(place / "copy")
    with sandbox.start(copy, settings, parent=place) as box:
        assert box.recovery.defaults == ("lc_monetary", "no_setting_of_this_version", "timezone_abbreviations")
        assert box.recovery.warnings == ()
        assert shown(box, "TimeZone") == "Pacific/Auckland"
        text = box.configuration.read_text()
        assert not any(word in text for word in ("shop.note", "a.b.c", "anon.salt", "secret", "bytea_output"))


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
