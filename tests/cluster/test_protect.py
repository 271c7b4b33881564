"""Protect, up, down and unprotect on real clusters, volumes and mounts, also when they fail or are killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest

from pgcdp import config as settings
from pgcdp import proc
from pgcdp.capture import attach, held, protect, volumes
from pgcdp.capture.checks import ProtectRequest
from pgcdp.capture.control import EngineClient
from pgcdp.capture.journal import Journal
from pgcdp.config import Config
from pgcdp.errors import PgcdpError, PreconditionError, UsageError
from pgcdp.postgres import cluster
from pgcdp.progress import Progress
from pgcdp.sets import list_sets
from tests.fix_house import MIB, House, assert_as_before, run_until
from tests.waiting import wait_until


class Load:
    """A client that notes every acknowledged insert, until its connection breaks or it is told to end."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.acknowledged = self.begin = house.count()
        self.ending = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with suppress(psycopg.Error), self.house.connect() as session:
            while not self.ending:
                session.execute("INSERT INTO ledger VALUES (%s)", [self.acknowledged + 1])
                self.acknowledged += 1

    def has_done(self, commits: int) -> bool:
        return self.acknowledged >= self.begin + commits

    def end(self) -> int:
        self.ending = True
        self.thread.join()
        return self.acknowledged


# --- it works


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_there_under_load_killed_and_back(house: House, fs: str) -> None:
    before = house.pgdata.stat()
    steps: list[str] = []
    config = protect.protect(house.request(fs=fs), lambda step: steps.append(step.step))
    assert settings.load_config("main") == config
    assert config.cluster.command_line == house.argv
    assert config.cluster.was_running
    running = house.postmaster()
    assert running is not None
    assert running.argv == house.argv
    after = house.pgdata.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert not (house.pgdata / "lost+found").exists()
    assert stat.S_IMODE(config.volumes[0].backing.stat().st_mode) == 0o600
    assert steps.index("copying the cluster") < steps.index("removing the old copy")
    mounted = volumes.mount_at(house.pgdata)
    assert mounted is not None
    assert mounted.fstype == fs
    assert house.count() == 1000

    # Killed under load, three times: every acknowledged commit is there.
    client = EngineClient(config.paths.control)
    for _ in range(3):
        load = Load(house)
        wait_until(partial(load.has_done, 200), what="200 commits")
        held.cut_off(config.paths)
        acknowledged = load.end()
        attach.up(config)
        assert house.count() in (acknowledged, acknowledged + 1)
    total = house.count()

    # Nothing to do is nothing done; down leaves plain volumes, up brings them back.
    pids = (client.status().pid, house.postmaster())
    attach.up(config)
    assert (client.status().pid, house.postmaster()) == pids
    attach.down(config)
    attach.down(config)
    assert volumes.mounts_below(house.root) == []
    assert volumes.loops_over(house.root) == {}
    check = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}[fs]
    proc.run([*check, str(config.volumes[0].backing)])
    attach.up(config)
    assert house.count() == total

    protect.unprotect(config)
    running = house.postmaster()
    assert running is not None
    assert running.argv == house.argv
    assert house.count() == total
    assert volumes.mount_at(house.pgdata) is None
    assert list_sets() == []
    assert not config.volumes[0].backing.exists()
    assert not config.journal.exists()
    assert house.pgdata.stat().st_mode == before.st_mode


def test_a_stopped_cluster_is_started_and_stays_stopped_afterwards(house: House) -> None:
    cluster.stop(house.pgdata)
    config = protect.protect(house.request())
    assert not config.cluster.was_running
    running = house.postmaster()
    assert running is not None
    assert running.argv == house.argv  # postmaster.opts told
    attach.stop_cluster(config)
    protect.unprotect(config)
    assert house.postmaster() is None
    assert cluster.read_control(house.pgdata).system_identifier == int(config.cluster.system_identifier)


def test_a_new_cluster_with_wal_on_a_volume_of_its_own(house: House) -> None:
    fresh = house.root / "fresh"
    lines = (("port", str(house.port + 1)), ("unix_socket_directories", f"{house.root}/socket"))
    config = protect.protect(
        house.request(
            name="new",
            pgdata=fresh,
            initdb=True,
            version=15,
            wal_size=256 * MIB,
            settings=lines,
            initdb_options=("--auth=trust",),
        )
    )
    assert [volume.name for volume in config.volumes] == ["data", "wal"]
    assert config.cluster.port == house.port + 1
    assert volumes.mount_at(fresh / "pg_wal") is not None
    with psycopg.connect(host=str(house.root / "socket"), port=config.cluster.port, user="postgres") as session:
        session.execute("CREATE TABLE t AS SELECT generate_series(1, 5000)")
    held.cut_off(config.paths)
    attach.up(config)
    status = EngineClient(config.paths.control).status()
    assert [volume.name for volume in status.volumes] == ["data", "wal"]
    protect.unprotect(config)
    assert volumes.mounts_below(house.root) == []
    assert (fresh / "pg_wal").is_dir()
    cluster.stop(fresh)


def test_a_free_loop_device_keeps_its_flushes(house: House) -> None:
    """The cache mode outlives the file: left at write-through, the next file's writes would be lost by a power cut."""
    image = house.root / "disk"
    volumes.make_image(image, 16 * MIB)
    device = volumes.attach_loop(image)
    mode = Path(f"/sys/block/{device.name}/queue/write_cache")
    assert mode.read_text().strip() == volumes.WRITE_BACK
    volumes.set_cache_mode(device, volumes.WRITE_THROUGH)
    volumes.detach_loop(device)
    assert mode.read_text().strip() == volumes.WRITE_BACK
    config = protect.protect(house.request())
    [captured] = volumes.loops_over(config.paths.fuse)
    mode = Path(f"/sys/block/{captured.name}/queue/write_cache")
    assert mode.read_text().strip() == volumes.WRITE_THROUGH
    attach.down(config)
    assert mode.read_text().strip() == volumes.WRITE_BACK


def test_a_mount_in_use_keeps_the_set_as_it_is(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain copy that waits for its switch would replace what clients have written since."""
    config = protect.protect(house.request())
    monkeypatch.setattr(attach, "BUSY_SECONDS", 0.5)
    with (house.pgdata / "PG_VERSION").open(), pytest.raises(PreconditionError, match="is in use by"):
        protect.unprotect(config)
    with house.connect() as session:
        session.execute("INSERT INTO ledger VALUES (1001)")
    attach.up(config)
    protect.unprotect(config)
    assert house.count() == 1001


def test_down_after_a_crash_of_the_machine_replays(house: House) -> None:
    """A volume that lacks answered writes is not plain: who mounts it has the next replay write over what he did."""
    config = protect.protect(house.request())
    with house.connect() as session:
        session.execute("INSERT INTO ledger VALUES (1001)")
    held.cut_off(config.paths)
    attach.clean_leftovers(config)  # what a boot leaves: nothing runs, nothing is mounted or attached
    journal = Journal(config.journal, config.set_id_bytes)
    mark = journal.applied_mark()
    assert mark is not None
    assert not mark.clean
    attach.down(config)
    mark = journal.applied_mark()
    assert mark is not None
    assert mark.clean
    assert mark.applied_write == mark.durable_write
    attach.up(config)
    assert house.count() == 1001


def test_a_given_device(house: House) -> None:
    image = house.root / "disk"
    volumes.make_image(image, 384 * MIB)
    device = volumes.attach_loop(image)
    proc.run(["mkfs.ext4", "-q", str(device)])
    (house.root / "mnt").mkdir()
    volumes.mount(device, house.root / "mnt", "ext4")
    request = house.request(size=None, volume=device)
    with pytest.raises(PreconditionError, match="is mounted at"):
        protect.protect(request)
    volumes.unmount(house.root / "mnt")
    with pytest.raises(PreconditionError, match="holds ext4"):
        protect.protect(request)
    with pytest.raises(UsageError, match="not a block device"):
        protect.protect(house.request(size=None, volume=image))
    config = protect.protect(house.request(size=None, volume=device, yes=True, fs="xfs"))
    assert config.volumes[0].device
    assert house.count() == 1000
    with pytest.raises(PreconditionError, match="exclusive use"):
        volumes.check_device(device, overwrite=True)
    protect.unprotect(config)
    assert house.count() == 1000


def test_a_device_is_known_by_the_name_that_was_given(house: House) -> None:
    """After a boot /dev/vg/lv leads to another number, and the number that it had may be somebody else's disk."""
    image, other, name = house.root / "disk", house.root / "other", house.root / "lv"
    volumes.make_image(image, 384 * MIB)
    volumes.make_image(other, 384 * MIB)
    name.symlink_to(volumes.attach_loop(image))
    config = protect.protect(house.request(size=None, volume=name))
    attach.down(config)
    volumes.detach_loop(name.readlink())
    usurper = volumes.attach_loop(other)  # most likely with the number that has just become free
    name.unlink()
    name.symlink_to(volumes.attach_loop(image))
    attach.up(config)
    assert house.count() == 1000
    protect.unprotect(config)
    volumes.detach_loop(name.readlink())
    volumes.detach_loop(usurper)
    assert not any(other.read_bytes()), "another disk was written to"


# --- refused, and nothing changed

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


# --- failed, and put back


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


# --- killed


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ("making the volume", "unprotected"),
        ("stopping Postgres", "unprotected"),
        ("copying the cluster", "unprotected"),
        ("starting capture", "unprotected"),
        ("switching to the volume", "unprotected"),
        ("attaching the volumes", "unprotected"),
        ("starting Postgres", "protected"),
        ("removing the old copy", "protected"),
    ],
)
def test_a_killed_protect_is_put_back_or_finished(house: House, step: str, outcome: str) -> None:
    run_until("protect", step, house.request())
    assert protect.recover("main") == outcome
    assert protect.recover("main") is None
    if outcome == "unprotected":
        assert_as_before(house)
    else:
        _assert_protected(house, settings.load_config("main"))


@pytest.mark.parametrize(
    ("step", "outcome"),
    [
        ("stopping Postgres", "protected"),
        ("copying to plain storage", "protected"),
        ("unmounting", "protected"),
        ("stopping capture", "protected"),
        ("switching to plain storage", "unprotected"),
        ("starting Postgres", "unprotected"),
        ("removing volume and journal", "unprotected"),
    ],
)
def test_a_killed_unprotect_is_put_back_or_finished(house: House, step: str, outcome: str) -> None:
    config = protect.protect(house.request())
    run_until("unprotect", step, house.request())
    with pytest.raises(PreconditionError, match=r"unprotect .* was interrupted"):
        attach.up(config)
    assert protect.recover("main") == outcome
    if outcome == "unprotected":
        assert_as_before(house)
    else:
        _assert_protected(house, config)


def _assert_protected(house: House, config: Config) -> None:
    assert attach.is_attached(config)
    assert house.count() == 1000
    assert [path.name for path in house.root.iterdir() if ".pgcdp-" in path.name] == []
    attach.down(config)
    attach.up(config)
    assert house.count() == 1000
    shutil.rmtree(house.root / "store", ignore_errors=True)
