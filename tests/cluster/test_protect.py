"""Protect, up, down and unprotect on real clusters, volumes and mounts, also when they are killed."""

from __future__ import annotations

import shutil
import stat
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest

from pgcdp import config as settings
from pgcdp import proc
from pgcdp.capture import attach, held, protect, volumes
from pgcdp.capture.control import EngineClient
from pgcdp.capture.journal import Journal
from pgcdp.config import Config
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.postgres import cluster
from pgcdp.sets import list_sets
from tests.failing_disks import unmount
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


def assert_flushes_when_free(device: Path) -> None:
    """Unless another test has attached it meanwhile."""
    free = [volumes.loop_backing(device) is None]
    mode = Path(f"/sys/block/{device.name}/queue/write_cache").read_text().strip()
    free.append(volumes.loop_backing(device) is None)
    assert mode == volumes.WRITE_BACK or not all(free)


def test_a_free_loop_device_keeps_its_flushes(house: House) -> None:
    """The cache mode outlives the file: left at write-through, the next file's writes would be lost by a power cut."""
    image = house.root / "disk"
    volumes.make_image(image, 16 * MIB)
    device = volumes.attach_loop(image)
    mode = Path(f"/sys/block/{device.name}/queue/write_cache")
    assert mode.read_text().strip() == volumes.WRITE_BACK
    volumes.set_cache_mode(device, volumes.WRITE_THROUGH)
    volumes.detach_loop(device)
    assert_flushes_when_free(device)
    config = protect.protect(house.request())
    [captured] = volumes.loops_over(config.paths.fuse)
    mode = Path(f"/sys/block/{captured.name}/queue/write_cache")
    assert mode.read_text().strip() == volumes.WRITE_THROUGH
    attach.down(config)
    assert_flushes_when_free(captured)


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
    unmount(house.root / "mnt", device)
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
