"""A volume gets more room while the cluster runs: nothing stops, every point of before and behind can be restored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psycopg
import pytest

from pgcdp import api
from pgcdp.capture import holder, volumes
from pgcdp.capture.attach import kill_and_wait
from pgcdp.errors import PgcdpError, UsageError
from pgcdp.growing import may_resize_ext4
from pgcdp.records import Target
from pgcdp.recovery.scratch import mounted
from tests.cluster.test_changed_volumes import mounted_plain
from tests.fix_disks import MakeDisk
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.load import ALLOWED, Load, check_prefix, keep_wal
from tests.waiting import wait_until

MIB = 1 << 20
SIZES = {"ext4": (256 * MIB, 400 * MIB), "xfs": (304 * MIB, 448 * MIB)}
pytestmark = pytest.mark.usefixtures("no_clone_stays")
NOISE = [
    *ALLOWED,
    r"terminating connection due to unexpected postmaster exit",
    r"checkpoints are occurring too frequently",
]
SETTINGS = {"max_prepared_transactions": "10", "max_wal_size": "64MB", "shared_buffers": "32MB"}


def room(found: ProtectedSet) -> int:
    """Bytes that the filesystem of the data directory holds."""
    told = os.statvfs(found.pgdata)
    return told.f_blocks * told.f_frsize


def assert_grown(found: ProtectedSet, size: int) -> None:
    """Backing, capture, device, settings, store and image agree."""
    (volume,) = found.config.volumes
    assert volume.bytes == size
    assert volumes.backing_bytes(volume.backing) - size in ((0, 512) if volume.device else (0,))
    assert [each.bytes for each in found.engine.status().volumes] == [size]
    assert [each.bytes for each in found.source().store.volumes] == [size]
    assert (found.store / "image" / "data.img").stat().st_size == size
    (device,) = volumes.loops_over(found.config.paths.fuse)
    assert volumes.backing_bytes(device) == size
    assert size - room(found) < 80 * MIB  # an xfs has a log of 64 MiB


NEEDS_RIGHT = pytest.mark.skipif(not may_resize_ext4(), reason="no CAP_SYS_RESOURCE: a mounted ext4 cannot grow")


@pytest.mark.parametrize("fs", [pytest.param("ext4", marks=NEEDS_RIGHT), "xfs"])
def test_under_load_with_points_on_both_sides(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    """Fills what there was not before; a clone from before goes on, and a kill right behind it loses nothing."""
    small, large = SIZES[fs]
    found = make_set(binaries_of(15), fs=fs, size=small, settings=SETTINGS, allowed=[*KILLED, *NOISE])
    load = Load(found.address(), found.binaries, postgres_user(), clients=2, ledgers=2, scale=1)
    load.prepare()
    postmaster = found.sql("select pg_postmaster_start_time()")
    with keep_wal(found.address(), found.binaries, postgres_user(), found.root / "wal") as copy:
        begin, source = found.durable(), found.source()
        clone = api.clone(found.name, Target("write", begin), name="before")
        load.start()
        load.wait_for(200)
        told = api.grow(found.name, large)
        assert told["bytes"] == large
        assert told["filesystem"]["after"] > told["filesystem"]["before"]
        load.wait_for(200)
        result = load.stop()
        copy.stop()
        order = copy.order()
    assert not result.failures
    assert_grown(found, large)
    assert found.sql("select pg_postmaster_start_time()") == postmaster, "Postgres was not stopped for it"
    middle = found.durable()
    api.cut(found.name)
    # More than fitted before: the image gets blocks behind its old end, under the clone's open view.
    filler = room(found) - small
    with (found.pgdata / "filler").open("wb") as file:
        file.write(os.urandom(os.statvfs(found.pgdata).f_bavail * 4096 * 9 // 10))
        file.flush()
        os.fsync(file.fileno())
    assert (found.pgdata / "filler").stat().st_size > filler
    full = found.durable()
    source.durable_write = full  # who opened the store before still reaches what lies behind its old end
    with mounted(source, found.source().resolve(Target("write", full)), found.root) as copy_of:
        assert (copy_of / "filler").stat().st_size > filler
    (found.pgdata / "filler").unlink()
    api.cut(found.name)
    with psycopg.connect(clone["dsn"]) as session:
        assert session.execute("select count(*) from ledger").fetchone() == (0,)
    api.destroy("before")
    found.kill_engine()
    found.up()
    assert_grown(found, large)
    for write in (begin, middle, full):
        with found.running_at(Target("write", write)) as box:
            assert check_prefix(box, result.acks, order, found.source().resolve(Target("write", write)).time_ns)
        assert found.verify(write)["ok"]
    found.wait_following()
    told = api.rewind(found.name, Target("write", begin), agree=lambda told: None)
    assert told["verified"]
    assert room(found) < 0.95 * large, "the filesystem is that of then, on a larger volume"
    api.rewind(found.name, Target("name", name=told["undo"]), agree=lambda told: None)
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)
    found.wait_following()
    assert all(each["ok"] for each in api.check(found.name, full=True)["checks"])


@pytest.mark.parametrize(
    ("size", "volume", "told"),
    [
        (200 * MIB, None, "would be less"),
        (1 << 50, None, "are needed"),
        (512 * MIB, "wal", 'no volume "wal"'),
        (None, None, "to which size"),
    ],
)
def test_refused_and_nothing_changed(
    make_set: MakeSet, binaries_of: BindirOf, size: int | None, volume: str | None, told: str
) -> None:
    found = make_set(binaries_of(15), fs="xfs", size=304 * MIB)
    with pytest.raises(PgcdpError, match=told) as caught:
        api.grow(found.name, size, volume)
    assert caught.value.exit_code in (2, 6)
    assert caught.value.hint
    assert_grown(found, 304 * MIB)


RUNNER = """
import os, signal, sys
from pgcdp import api, config, fsio, growing, service
from pgcdp.capture import control

def killed(*arguments, **more):
    os.kill(os.getpid(), signal.SIGKILL)

what = sys.argv[1]
if what == "before the store":
    ask = service.ask
    service.ask = lambda paths, command, *a, **m: (killed if command == "grow" else ask)(paths, command, *a, **m)
elif what == "before the settings":
    config.save_config = killed
elif what == "before capture":
    control.EngineClient.grow = killed
elif what == "before the device":
    run = growing.proc.run
    growing.proc.run = lambda words, *a, **m: (killed if words[0] == "losetup" else run)(words, *a, **m)
elif what == "before the filesystem":
    growing.grow_filesystem = killed
api.grow("main", 400 << 20)
"""


@pytest.mark.parametrize(
    "step",
    ["before the store", "before the settings", "before capture", "before the device", "before the filesystem"],
)
def test_killed_the_same_command_finishes_it(make_set: MakeSet, binaries_of: BindirOf, step: str) -> None:
    """Also when capture begins anew in between, and finds a backing that is larger than the store knows."""
    found = make_set(binaries_of(15), fs="xfs", size=304 * MIB, allowed=[*KILLED, *NOISE])
    done = subprocess.run([sys.executable, "-c", RUNNER, step], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found.sql("create table t as select generate_series(1, 10000)")
    api.cut(found.name)
    found.kill_engine()
    found.up()
    found.wait_following()
    assert found.sql("select count(*) from t") == [(10000,)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pgcdp", "grow", "main", "400M"], capture_output=True, text=True, check=True
    )
    assert "volume data has 400.0 MiB" in done.stdout
    assert_grown(found, 400 * MIB)
    api.cut(found.name)
    assert found.verify(found.durable())["ok"]
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)


def test_killed_between_store_and_settings_then_healed(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The store knows of more than the volume has: behind its end there is nothing to compare, and nothing to read."""
    found = make_set(binaries_of(15), fs="xfs", size=304 * MIB, allowed=[*KILLED, *NOISE])
    found.sql("create table t as select generate_series(1, 1000)")
    done = subprocess.run([sys.executable, "-c", RUNNER, "before the settings"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    api.down(found.name)
    (volume,) = found.config.volumes
    assert found.source().store.volumes[0].bytes > volume.bytes
    with mounted_plain(found, volume) as place:
        (place / "foreign").write_bytes(b"x" * 100_000)
    assert api.up(found.name, heal=lambda differences: None)["gap"]["blocks"] > 0
    api.grow(found.name, 400 * MIB)
    assert_grown(found, 400 * MIB)
    api.cut(found.name)
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)


def test_a_device_that_has_become_larger(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf) -> None:
    """What was on the disk behind the old end is not what the image has there: it becomes zeros first."""
    device = make_disk(304 * MIB)
    found = make_set(binaries_of(15), protect=False)
    found.fs = "xfs"
    found.protect(size=None, volume=device, settings={}, journal_limit=1 << 30)
    disk = volumes.loop_backing(device)
    assert disk is not None
    with disk.open("ab") as file:
        file.write(os.urandom(96 * MIB + 512))  # a partition need not be whole blocks
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    api.down(found.name)
    api.up(found.name)
    assert [each.bytes for each in found.engine.status().volumes] == [304 * MIB], "no place to write that no image has"
    found.wait_following()
    with pytest.raises(PgcdpError, match="which has 419430400 bytes"):
        api.grow(found.name, 512 * MIB)
    assert api.grow(found.name, None)["bytes"] == 400 * MIB
    assert_grown(found, 400 * MIB)
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)


def test_a_file_that_was_made_larger(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """By a killed run that was to make it larger still, or by hand: what is there is no part of the volume."""
    found = make_set(binaries_of(15), fs="xfs", size=304 * MIB)
    with found.config.volumes[0].backing.open("ab") as file:
        file.write(os.urandom(128 * MIB + 100))
    api.down(found.name)
    api.up(found.name)
    assert [each.bytes for each in found.engine.status().volumes] == [304 * MIB]
    found.wait_following()
    assert api.grow(found.name, 352 * MIB)["bytes"] == 352 * MIB
    assert_grown(found, 352 * MIB)
    with pytest.raises(UsageError, match="would be less") as caught:
        api.grow(found.name, 320 * MIB)
    assert "pgcdp grow main --volume data 352M" in str(caught.value.hint)
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)


def test_what_grew_is_shown_whole_by_the_next_capture_process_though_its_settings_are_damaged(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """Shown as it was before, the filesystem would get I/O errors for what lies behind that."""
    if holder.missing() is not None:
        pytest.skip(f"no holder here: {holder.missing()}")
    small, large = SIZES["xfs"]
    allowed = [*KILLED, r"no capture process takes over", r"retention: .*\.toml: "]
    found = make_set(binaries_of(15), fs="xfs", size=small, allowed=allowed)
    api.grow(found.name, large)
    engine, settings = found.engine, found.config.paths.config_file
    text = settings.read_text()
    settings.write_text("[[[")
    try:
        kill_and_wait(engine.status().pid)
        wait_until(engine.alive, timeout=60, what="the next capture process")
        assert engine.status().volumes[0].bytes == large
    finally:
        settings.write_text(text)
    found.wait_following()
