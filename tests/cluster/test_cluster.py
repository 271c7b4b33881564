"""Looking at clusters, stopping them, starting them as they ran before, and sessions with them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgcdp import proc
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.postgres import cluster, session
from pgcdp.postgres.agent_session import Session
from pgcdp.postgres.cluster import Binaries
from tests.fix_postgres import PORT, BindirOf, MakeCluster, postgres_user
from tests.scratch import scratch_directory


@pytest.fixture
def place() -> Iterator[Path]:
    path = scratch_directory("cluster")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def pg15(binaries_of: BindirOf) -> Binaries:
    return binaries_of(15)


def test_starts_again_as_it_ran(pg_binaries: Binaries, make_cluster: MakeCluster) -> None:
    live = make_cluster(pg_binaries)
    live.stop()
    live.options = ("-c", "work_mem=5MB", "-c", "cluster_name=two words")
    first = live.start()
    found = cluster.inspect(live.pgdata)
    assert found.postmaster == first
    assert (found.major, found.user.name, found.checksums) == (pg_binaries.major, "postgres", True)
    assert (first.port, first.socket_directory, first.log_file) == (PORT, live.sockets, live.log_file)
    assert cluster.stop(live.pgdata)
    assert not first.alive
    assert cluster.find_postmaster(live.pgdata) is None
    assert not cluster.stop(live.pgdata), "none was running"

    again = cluster.start(first.argv, live.pgdata, found.user, first.log_file)
    assert (again.argv, again.port, again.socket_directory, again.log_file) == (
        first.argv, first.port, first.socket_directory, first.log_file,
    )  # fmt: skip
    assert live.sql("select current_setting('work_mem'), current_setting('cluster_name')") == [("5MB", "two words")]
    assert os.stat(f"/proc/{again.pid}").st_uid == found.user.uid
    assert int(Path(f"/proc/{again.pid}/stat").read_text().rpartition(")")[2].split()[1]) != os.getpid()
    with pytest.raises(PreconditionError, match=rf"a postmaster \({again.pid}\) runs"):
        cluster.start(first.argv, live.pgdata, found.user)


def test_a_stale_postmaster_pid_is_not_believed(pg15: Binaries, make_cluster: MakeCluster) -> None:
    live, other = make_cluster(pg15), make_cluster(pg15)
    theirs = cluster.find_postmaster(other.pgdata)
    assert theirs is not None
    live.stop()
    for pid in (os.getpid(), theirs.pid, 1, 99999999):
        (live.pgdata / "postmaster.pid").write_text(f"{pid}\n{live.pgdata}\n")
        assert cluster.find_postmaster(live.pgdata) is None
        assert cluster.inspect(live.pgdata).postmaster is None


def test_found_without_its_file(pg15: Binaries, make_cluster: MakeCluster) -> None:
    """As on a dead filesystem, where postmaster.pid cannot be read."""
    live, other = make_cluster(pg15), make_cluster(pg15)
    expected = cluster.find_postmaster(live.pgdata)
    assert expected is not None
    (live.pgdata / "postmaster.pid").rename(live.root / "pid")
    (live.pgdata / "postmaster.pid").mkdir()
    found = cluster.find_postmaster(live.pgdata)
    assert found is not None
    assert (found.pid, found.started, found.argv) == (expected.pid, expected.started, expected.argv)
    processes = cluster.find_processes(live.pgdata)
    assert found.pid in processes
    assert len(processes) > 4
    assert sorted(cluster.kill_leftovers(live.pgdata)) == processes
    assert cluster.find_processes(live.pgdata) == []
    assert other.sql("select 1") == [(1,)], "the neighbour was left alone"
    (live.pgdata / "postmaster.pid").rmdir()


def test_leftovers_of_an_unmounted_filesystem(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    """The mount is gone from the tree, the postmaster is still on it."""
    live, point, image = make_cluster(pg15), place / "point", place / "image"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(200 << 20)
    proc.run(["mkfs.ext4", "-q", str(image)])
    proc.run(["mount", "-o", "loop", str(image), str(point)])
    try:
        proc.run(["cp", "-a", str(live.crash_copy(place / "copy")), str(point / "data")])
        pgdata = point / "data"
        (pgdata / "postmaster.pid").unlink()
        os.chown(place, postgres_user().uid, -1)
        argv = cluster.command_line(pg15, pgdata, "-c", "listen_addresses=", "-c", f"unix_socket_directories={place}")
        started = cluster.start(argv, pgdata, postgres_user(), place / "log")
        proc.run(["umount", "--lazy", str(point)])
        assert started.alive
        assert started.pid in cluster.kill_leftovers(pgdata)
        assert not started.alive
    finally:
        proc.run(["umount", "-q", str(point)], check=False)
    assert live.sql("select 1") == [(1,)]


def test_a_cluster_that_will_not_stop(pg15: Binaries, make_cluster: MakeCluster) -> None:
    live = make_cluster(pg15)
    walwriter = live.sql("select pid from pg_stat_activity where backend_type = 'walwriter'")[0][0]
    os.kill(walwriter, signal.SIGSTOP)
    try:
        with pytest.raises(PreconditionError, match=r"did not stop in 1 s .*waiting for: .*walwriter"):
            cluster.stop(live.pgdata, timeout=1)
        assert cluster.find_postmaster(live.pgdata) is not None
    finally:
        os.kill(walwriter, signal.SIGCONT)


def test_a_start_that_fails_says_why(pg15: Binaries, make_cluster: MakeCluster) -> None:
    live = make_cluster(pg15)
    live.stop()
    live.configure(shared_preload_libraries="no_such_library")
    live.allowed.append("no_such_library")
    with pytest.raises(PreconditionError, match=r'could not access file "no_such_library"'):
        live.start()


def test_bad_directories(pg15: Binaries, make_cluster: MakeCluster, place: Path) -> None:
    with pytest.raises(PreconditionError, match="no directory"):
        cluster.inspect(place / "none")
    with pytest.raises(PreconditionError, match="not a data directory"):
        cluster.inspect(place)
    live = make_cluster(pg15)
    live.stop()
    with (live.pgdata / "global" / "pg_control").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    with pytest.raises(DamageError, match=r"global/pg_control: the checksum"):
        cluster.inspect(live.pgdata)
    with pytest.raises(PreconditionError, match="no programs of PostgreSQL 14"):
        cluster.find_binaries(14, place)
    with pytest.raises(PreconditionError, match="PostgreSQL 12 is not supported"):
        cluster.find_binaries(12)
    with pytest.raises(PreconditionError, match="pg_none of PostgreSQL 15 is missing"):
        pg15.path("pg_none")


def test_sessions_with_peer_authentication(pg_binaries: Binaries, make_cluster: MakeCluster) -> None:
    """Root gets in as the cluster's owner, without becoming him anywhere else."""
    live = make_cluster(pg_binaries)
    live.stop()
    (live.pgdata / "pg_hba.conf").write_text("local all postgres peer\n")
    live.start()
    live.allowed.append("Peer authentication failed")
    dsn = session.Dsn(live.sockets, PORT, "postgres", live.user)
    with pytest.raises(PreconditionError, match="Peer authentication failed"):
        session.connect(live.address())

    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(os.geteuid())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with session.connect(dsn, superuser=True) as connection:
            kept = session.settings(connection)
            assert os.geteuid() == 0
        agent = asyncio.run(_agent(dsn, live.pgdata))
    finally:
        stop.set()
        watcher.join()
    assert seen == {0}, "another thread has kept its rights"
    assert agent == kept
    assert kept["superuser"] == "postgres"
    assert kept["data_directory"] == str(live.pgdata)
    assert kept["server_version_num"] // 10000 == pg_binaries.major
    rows = {row["name"]: row for row in kept["settings"]}
    assert rows["listen_addresses"]["source"] == "command line"
    assert rows["max_wal_size"]["sourcefile"] == str(live.pgdata / "postgresql.conf")
    assert {each["name"] for each in kept["databases"]} == {"template1", "template0", "postgres"}


async def _agent(dsn: session.Dsn, pgdata: Path) -> session.Settings:
    before = cluster.read_control(pgdata).checkpoint_lsn
    agent = await Session.open(dsn)
    assert os.geteuid() == 0
    await agent.checkpoint()
    assert cluster.read_control(pgdata).checkpoint_lsn > before
    kept = await agent.settings()
    await agent.close()
    assert agent.closed
    with pytest.raises(PreconditionError, match="did not do what pgcdp asked"):
        await agent.checkpoint()
    return kept


def test_session_gives_up_in_time(place: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot connect to postgres"):
        session.connect(session.Dsn(place, PORT))
    with pytest.raises(PreconditionError, match="cannot connect to postgres"):
        asyncio.run(Session.open(session.Dsn(place, PORT, "postgres", postgres_user())))


def test_programs_that_fail(place: Path) -> None:
    with pytest.raises(proc.ProcessFailed, match=r"sh failed with exit code 3: four \| five"):
        proc.run(["sh", "-c", "echo one; printf 'four\nfive\n' >&2; exit 3"])
    with pytest.raises(proc.ProcessFailed, match=r"did not end in 0.2 s"):
        proc.run(["sleep", "100"], timeout=0.2)
    with pytest.raises(PreconditionError, match="cannot run no-such-program"):
        proc.run(["no-such-program"])
    assert proc.run(["id", "-un"], user=postgres_user()).stdout == "postgres\n"
    assert proc.run(["cat"], input="ö").stdout == "ö"
    assert proc.run(["pwd"]).stdout == "/\n"
