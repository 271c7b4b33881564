"""What protect refuses changes nothing, and what fails on the way is put back as it was."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgcdp import proc
from pgcdp.capture import attach, protect, volumes
from pgcdp.capture.checks import ProtectRequest
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres import cluster
from pgcdp.progress import Progress
from tests.fix_house import MIB, House, assert_as_before
from tests.fix_keys import new_key

Change = Callable[[House], ProtectRequest]


def _linked_wal(house: House) -> ProtectRequest:
    cluster.stop(house.pgdata)
    (house.pgdata / "pg_wal").rename(house.root / "wal")
    (house.pgdata / "pg_wal").symlink_to(house.root / "wal")
    house.start()
    return house.request()


def _tablespace(house: House) -> ProtectRequest:
    (house.root / "space").mkdir()
    os.chown(house.root / "space", house.user.uid, house.user.gid)
    with house.connect() as session:
        session.execute(f"CREATE TABLESPACE elsewhere LOCATION '{house.root / 'space'}'")
    return house.request()


def _not_a_cluster(house: House) -> ProtectRequest:
    (house.root / "empty").mkdir()
    return house.request(pgdata=house.root / "empty")


def _full_store(house: House) -> ProtectRequest:
    (house.root / "store").mkdir()
    (house.root / "store" / "something").touch()
    return house.request()


def _left_over(house: House) -> ProtectRequest:
    (house.root / "pg.pgcdp-before-main").mkdir()
    return house.request()


def _captured_key(house: House) -> ProtectRequest:
    return house.request(encrypt_key_file=new_key(house.pgdata / "key").file)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda house: house.request(pgdata=house.root / "none"), "no directory"),
        (_not_a_cluster, "is not a data directory"),
        (lambda house: house.request(pgdata=Path("pg")), "not an absolute path"),
        (lambda house: house.request(name="Main"), "not a set name"),
        (lambda house: house.request(store=house.pgdata / "store"), "inside the data directory"),
        (lambda house: house.request(store=house.root / "no" / "store"), "/no does not exist"),
        (lambda house: house.request(journal=house.pgdata / "journal"), "inside the data directory"),
        (lambda house: house.request(journal=house.root / "store" / "j"), "lie in each other"),
        (_full_store, "not empty"),
        (lambda house: house.request(size=32 * MIB), "does not fit|needs"),
        (lambda house: house.request(size=200 * MIB, fs="xfs"), "xfs needs 300"),
        (lambda house: house.request(size=1 << 50), "1024.0 TiB"),
        (lambda house: house.request(journal_limit=1 << 50), "the journal"),
        (lambda house: house.request(size=None), "exactly one of"),
        (lambda house: house.request(volume=Path("/dev/null")), "exactly one of"),
        (lambda house: house.request(size=None, volume=Path("/dev/null")), "not a block device"),
        (lambda house: house.request(size=None, volume=house.root / "none"), "does not exist"),
        (lambda house: house.request(cut=("sometimes",)), "--cut"),
        (lambda house: house.request(bindir=house.root), "holds no PostgreSQL"),
        (lambda house: house.request(initdb=True), "not empty"),
        (_linked_wal, "pg_wal is a link"),
        (_tablespace, "tablespace .* outside"),
        (_left_over, "pgcdp-before-main exists"),
        (_captured_key, "key lies in .*pg, which is captured"),
    ],
)
def test_refused_and_nothing_changed(house: House, change: Change, told: str) -> None:
    request = change(house)
    before = house.picture()
    with pytest.raises(PgcdpError, match=told) as caught:
        protect.protect(request)
    assert caught.value.exit_code in (2, 6)
    assert caught.value.hint
    assert house.picture() == before
    assert house.count() == 1000


@contextmanager
def listening(family: socket.AddressFamily, place: tuple[str, int] | str) -> Iterator[int]:
    """Another program that has a port or a Unix socket; the number of the port."""
    with socket.socket(family) as door:
        door.bind(place)
        door.listen()
        yield door.getsockname()[1] if family == socket.AF_INET else 0


def test_a_port_that_is_taken_is_said_before_anything_is_made(house: House) -> None:
    """Not when the cluster was made, copied and mounted already, and only its start fails."""
    before = house.picture()
    settings = (("port", str(house.port)), ("unix_socket_directories", f"/run, {house.root / 'socket'}"))
    new = house.request(name="new", pgdata=house.root / "new", initdb=True, settings=settings)
    with pytest.raises(
        PreconditionError, match=rf"port {house.port} .* taken: the cluster in {house.pgdata} \("
    ) as told:
        protect.protect(new)
    assert "--port" in str(told.value.hint)
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as port:
        words = ("new", "--pgdata", str(house.root / "new"), "--store", str(house.root / "store"), "--size", "384M")
        command = [sys.executable, "-P", "-m", "pgcdp", "protect", *words, "--initdb", "--port", str(port), "--yes"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 6
    assert (
        f"port {port} of the cluster is taken: another program listens on TCP port {port} of localhost" in done.stderr
    )
    assert house.picture() == before
    assert house.count() == 1000
    cluster.stop(house.pgdata)
    before = house.picture()
    place = house.root / "socket" / f".s.PGSQL.{house.port}"
    with (
        listening(socket.AF_UNIX, str(place)),
        pytest.raises(PreconditionError, match="taken: another server listens"),
    ):
        protect.protect(house.request())
    place.unlink()
    assert house.picture() == before


def test_a_mount_point_or_a_mount_inside_is_refused(house: House) -> None:
    inside = house.pgdata / "pg_stat_tmp"
    proc.run(["mount", "-t", "tmpfs", "none", str(inside)])
    with pytest.raises(PreconditionError, match=r"is mounted inside .*/pg"):
        protect.protect(house.request())
    volumes.unmount(inside)


def test_a_second_protect_and_a_name_in_use_are_refused(house: House) -> None:
    config = protect.protect(house.request())
    with pytest.raises(PreconditionError, match='"main" exists already'):
        protect.protect(house.request())
    with pytest.raises(PreconditionError, match='already protected by the set "main"'):
        protect.protect(house.request(name="other", store=house.root / "other"))
    with attach.hold(config.paths), pytest.raises(PreconditionError, match="locked"):
        attach.up(config)
    attach.down(config)
    proc.run(["mount", "-t", "tmpfs", "none", str(house.pgdata)])
    with pytest.raises(PreconditionError, match="not of the set main"):
        attach.up(config)
    volumes.unmount(house.pgdata)
    attach.up(config)
    assert house.count() == 1000


def test_an_engine_that_fails_leaves_everything_as_before(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = house.root / "engine"
    engine.write_text("#!/bin/sh\necho 'pgcdp-engine: error: the disk is gone' >&2\necho 'hint: buy one' >&2\nexit 6\n")
    engine.chmod(0o755)
    monkeypatch.setenv("PGCDP_ENGINE", str(engine))
    house.allowed.append("the disk is gone")
    with pytest.raises(PreconditionError, match=r"^the disk is gone$") as caught:
        protect.protect(house.request())
    assert caught.value.hint == "buy one"
    assert_as_before(house)


def test_a_new_cluster_that_fails_leaves_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCDP_ENGINE", "/bin/false")
    with pytest.raises(PgcdpError, match="ended with exit code 1"):
        protect.protect(house.request(pgdata=house.root / "fresh", initdb=True))
    assert not (house.root / "fresh").exists()
    assert_as_before(house)


def test_only_root(house: House) -> None:
    config = protect.protect(house.request())
    os.seteuid(house.user.uid)
    try:
        for verb in (lambda: protect.protect(house.request()), lambda: protect.unprotect(config)):
            with pytest.raises(PreconditionError, match="need root"):
                verb()
    finally:
        os.seteuid(0)
    assert house.count() == 1000


def test_a_cluster_that_will_not_stop_runs_on(house: House) -> None:
    session = house.connect()
    os.kill(session.info.backend_pid, signal.SIGSTOP)
    with pytest.raises(PreconditionError, match="did not stop in 1 s"):
        protect.protect(house.request(stop_seconds=1.0))
    session.close()
    assert_as_before(house)


def test_a_postgres_that_does_not_start_there_is_put_back(house: House) -> None:
    def break_it(step: Progress) -> None:
        if step.step == "starting Postgres" and volumes.mount_at(house.pgdata):
            (house.pgdata / "postgresql.conf").write_text("nonsense = 1\n")

    with pytest.raises(PreconditionError, match="did not start"):
        protect.protect(house.request(), break_it)
    assert_as_before(house)
