"""The disk under a volume is lost: that is said, and the volume is written anew, byte for byte as it was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api, fsio, proc, remaking, service
from pgcdp.capture import same_parts, sharing, volumes
from pgcdp.errors import DamageError, PgcdpError, PreconditionError, UsageError
from pgcdp.remaking import Lost
from pgcdp.sets import set_paths
from tests.cluster.test_several_volumes import counts, fill
from tests.fix_disks import MakeDisk
from tests.fix_engine import MIB
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet, first_difference
from tests.spread import spread_set
from tests.waiting import wait_until

GONE = [*KILLED, r"cannot open the backing .* of volume", r"how the volumes of main are could not be written down"]


def a_set(make_set: MakeSet, binaries_of: BindirOf, **options: Any) -> ProtectedSet:
    """With rows in the store, and others that are only in its journal."""
    found = make_set(binaries_of(15), size=384 * MIB, allowed=GONE, **options)
    found.sql("create table kept (n int primary key)")
    found.sql("insert into kept select generate_series(1, 10000)")
    api.cut(found.name)
    found.sql("delete from kept where n % 2 = 0")
    found.kill_agent()
    found.sql("insert into kept values (20001)")
    return found


def rows(found: ProtectedSet) -> int:
    return int(found.sql("select count(*) from kept")[0][0])


def taken_away(found: ProtectedSet, *names: str) -> list[tuple[Path, Path]]:
    """Backings, each with where it is now: what is written anew must be the same."""
    moved = [(each.backing, found.root / each.name) for each in found.config.volumes if each.name in names]
    for backing, to in moved:
        backing.rename(to)
    return moved


def assert_well(found: ProtectedSet, count: int) -> None:
    """It runs, is captured, and is what store and journal say."""
    assert rows(found) == count
    found.wait_following()
    found.sql("insert into kept values (-1)")
    api.cut(found.name)
    found.amcheck()
    assert [each for each in api.check(found.name)["checks"] if not each["ok"]] == []
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)
    assert rows(found) == count + 1


@pytest.mark.parametrize(("fs", "names"), [("ext4", ["data", "wal"]), ("xfs", ["data"])])
def test_removed_while_the_set_was_down(make_set: MakeSet, binaries_of: BindirOf, fs: str, names: list[str]) -> None:
    """Its last writes are only in the journal; what came back is every byte of what was there."""
    found = a_set(make_set, binaries_of, fs=fs, wal_size=320 * MIB)
    api.down(found.name)
    moved = taken_away(found, *names)
    with pytest.raises(PgcdpError, match=f"cannot open the backing {moved[0][0]}") as told:
        api.up(found.name)
    assert f"pgcdp up {found.name} --remake data" in str(told.value.hint)
    assert [each["detail"] for each in api.check(found.name)["checks"] if each["name"] == "volumes"] == [
        f"{backing} of volume {backing.stem}: no such file or directory" for backing, _ in moved
    ]
    shown: list[Lost] = []
    remaking.remake(found.config, names, shown.extend)
    assert [each.volume.name for each in shown] == names
    for backing, before in moved:
        assert first_difference(backing, before) is None
        assert backing.stat().st_mode & 0o777 == 0o600
        assert backing.stat().st_blocks * 512 >= backing.stat().st_size, "it has all its room, also for what is zeros"
    api.up(found.name)
    assert_well(found, 5001)


def test_removed_under_a_set_that_runs(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Capture goes on with what it has open; that, and what Postgres did until the end, is in the new one."""
    found = a_set(make_set, binaries_of)
    api.up(found.name)
    (volume,) = found.config.volumes
    volume.backing.unlink()
    found.sql("insert into kept values (20002)")
    (check,) = [each for each in api.check(found.name)["checks"] if each["name"] == "volumes"]
    assert not check["ok"]
    assert f"pgcdp up {found.name} --remake data" in check["hint"]
    volume.backing.write_bytes(b"another")
    (check,) = [each for each in api.check(found.name)["checks"] if each["name"] == "volumes"]
    assert "is not the file that capture of volume data has open" in check["detail"]
    with pytest.raises(PreconditionError, match="is there: volume data is not lost"):
        api.up(found.name, remake=["data"])
    volume.backing.unlink()
    found.allowed += [r"(PANIC|FATAL|ERROR|WARNING|LOG):  .*", r"error"]
    api.up(found.name, remake=["data"])
    assert_well(found, 5002)


STEPS = ["zeroing volume ts-slow", "copying the image", "syncing volume ts-slow"]
RUNNER = """
import os, signal, sys
from pgcdp import api

def report(progress):
    if progress.step == sys.argv[1] and progress.done == progress.total:
        os.kill(os.getpid(), signal.SIGKILL)

api.up("main", report, remake=sys.argv[2:])
"""


def killed_at(step: str, name: str) -> None:
    """`pgcdp up --remake NAME`, killed at the end of a step."""
    done = subprocess.run([sys.executable, "-c", RUNNER, step, name], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_on_a_new_disk(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A block device that was written to half is never taken for the volume; `up` goes on until it is whole."""
    found = spread_set(make_set, make_disk, binaries_of(15), settings={"autovacuum": "off"}, allowed=[*KILLED])
    fill(found)
    found.sql("delete from in_slow where n > 100")
    (volume,) = [each for each in found.config.volumes if each.name == "ts-slow"]
    for step in STEPS:
        api.down(found.name)
        before = found.root / "before"
        before.write_bytes(volume.backing.read_bytes()[: volume.bytes])
        with volume.backing.open("r+b") as blank:
            volumes.zero_out(blank.fileno(), 0, volume.bytes, lambda done: None)
            os.fsync(blank.fileno())
        with pytest.raises(PreconditionError, match="no filesystem that pgcdp knows") as told:
            api.up(found.name)
        assert f"pgcdp up {found.name} --remake ts-slow" in str(told.value.hint)
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, step, "ts-slow"], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        with pytest.raises(PreconditionError, match="anew was interrupted") as told:
            api.down(found.name)
        assert f"pgcdp up {found.name} finishes it" in str(told.value.hint)
        assert "writing volumes anew has not ended" in str(found.status()["error"])
        with pytest.raises(PreconditionError, match=f"anew, to {volume.backing}, was interrupted") as told:
            api.up(found.name)
        assert f"pgcdp up {found.name} --remake ts-slow goes on" in str(told.value.hint)
        remaking.remake(found.config, ["ts-slow"], lambda lost: None)
        assert first_difference(volume.backing, before, volume.bytes) is None, step
        api.up(found.name)
        with found.connect() as session:
            assert counts(session) == [1000, 1000, 100, 100]
        found.wait_following()
    api.down(found.name)
    fsio.write_json(found.config.paths.remake_state, {"volumes": ["data", "ts-slow"]})  # killed behind data's new name
    api.up(found.name, remake=["ts-slow"])
    api.down(found.name)
    found.assert_volume_is_newest()


def test_a_disk_of_another_volume_is_not_written_over(
    make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """By whatever path, of this set or of another one, also where it is not at its own place just now."""
    found = make_set(binaries_of(15), size=384 * MIB, wal_volume=make_disk(304 * MIB), allowed=GONE)
    api.down(found.name)
    config = found.config
    data, wal = config.volumes
    before = wal.backing.read_bytes()

    def refused(match: str) -> None:
        held = wal.backing.read_bytes()
        with pytest.raises(PreconditionError, match=match):
            api.up(found.name, remake=["wal"])
        assert not config.paths.remake_state.exists()
        assert wal.backing.read_bytes() == held

    def write(content: bytes) -> None:
        with wal.backing.open("r+b") as disk:
            disk.write(content)
            os.fsync(disk.fileno())

    with data.backing.open("rb") as image:
        write(image.read(MIB))
    refused(f"holds {found.fs} .*: that is volume data of main")
    write(bytes(MIB))
    other = config.paths.config_file.with_name("other.toml")
    other.write_bytes(b"not whole")
    parts = set_paths("other").state / same_parts.FILE
    parts.parent.mkdir(mode=0o700)
    write(before[:MIB])
    fsio.write_json(parts, {"journal": "x", "mark": 1, "volumes": {"ts": fsio.read_json(
        config.paths.state / same_parts.FILE)["volumes"]["wal"]}})  # fmt: skip
    refused("that is volume ts of other")
    parts.unlink()
    other.write_bytes(config.paths.config_file.read_bytes())
    write(b"x" * MIB)
    refused('is that of set "other"')
    other.unlink()
    at = parts.parent / "wal"
    at.symlink_to(wal.backing)
    twice = replace(config, volumes=(replace(data, backing=at), wal))
    with pytest.raises(PreconditionError, match="is that of volume data, which is at"):
        sharing.refuse_taken(twice, wal)
    shutil.rmtree(parts.parent)
    write(before[:MIB])
    remaking.remake(config, ["wal"], lambda lost: None)
    assert wal.backing.read_bytes()[: wal.bytes] == before[: wal.bytes]


def test_killed_and_its_disk_is_not_mounted(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """`up` neither fills the disk that the mount point lies on, nor makes a directory there; then it goes on."""
    found = a_set(make_set, binaries_of, wal_size=320 * MIB)
    api.down(found.name)
    place = found.config.paths.volumes
    disk = place.rename(found.root / "disk")
    before = (disk / "wal.img").rename(found.root / "wal")
    place.mkdir(mode=0o700)
    with mounted(disk, place):
        killed_at("syncing volume wal", "wal")
    for gone in (False, True):
        if gone:
            place.rmdir()
        for remake in ([], ["wal"]):
            with pytest.raises(PreconditionError, match=f"was mounted at {place}: nothing is mounted there"):
                api.up(found.name, remake=remake)
            assert not gone or not place.exists()
            assert gone or list(place.iterdir()) == []
    place.mkdir(mode=0o700)
    with mounted(disk, place):
        assert remaking.resume(found.config) == ["wal"]
        assert first_difference(place / "wal.img", before) is None
        api.up(found.name)
        assert rows(found) == 5001
        api.down(found.name)
    place.rmdir()
    disk.rename(place)
    api.up(found.name)


@contextmanager
def mounted(disk: Path, place: Path) -> Iterator[None]:
    """A directory, as a disk is."""
    proc.run(["mount", "--bind", str(disk), str(place)])
    try:
        yield
    finally:
        proc.run(["umount", str(place)])


def test_what_cannot_be_remade_is_refused(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """With nothing changed; and another volume's damage does not keep from it, its own does."""
    found = a_set(make_set, binaries_of, wal_size=320 * MIB)
    found.allowed.append(r"data\.img has a damaged block")
    config = found.config

    def refused(kind: type[PgcdpError], match: str, names: Sequence[str]) -> None:
        with pytest.raises(kind, match=match):
            api.up(found.name, remake=names)
        assert not config.paths.remake_state.exists()
        assert not list(config.paths.volumes.glob("*.fresh"))

    refused(UsageError, 'has no volume "dat"', ["dat"])
    refused(PreconditionError, "is there: volume data is not lost", ["data"])
    assert rows(found) == 5001, "it runs on"
    api.down(found.name)
    moved = dict(taken_away(found, "data", "wal"))
    away = config.paths.volumes.rename(found.root / "away")
    refused(PreconditionError, "where volume data is to be written, does not exist", ["data"])
    config.paths.volumes.mkdir()
    proc.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(config.paths.volumes)])
    try:
        refused(PreconditionError, "free, volume wal needs 320.0 MiB", ["wal"])
    finally:
        proc.run(["umount", str(config.paths.volumes)])
    away.rmdir()
    with (found.store / "image/data.img").open("r+b") as image:  # what is written later hides some of it
        for at in range(0, 384 * MIB, MIB):
            image.seek(at)
            image.write(b"\xff")
    remaking.remake(config, ["wal"], lambda lost: None)
    refused(DamageError, r"data\.img", ["data"])
    for backing, before in moved.items():
        if backing.exists():
            assert first_difference(backing, before) is None
        else:
            before.rename(backing)


def test_capture_is_not_started_on_a_blank_disk(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A disk that died is replaced under a set that waits for a capture process: nothing reads zeros for data."""
    found = make_set(binaries_of(15), size=None, volume=make_disk(384 * MIB), allowed=[*KILLED, r"another disk"])
    found.sql("create table kept as select generate_series(1, 10000) as n")
    (volume,) = found.config.volumes
    found.kill_agent()
    found.kill_capture()
    with volume.backing.open("r+b") as disk:
        head = disk.read(MIB)
        disk.seek(0)
        disk.write(bytes(MIB))
        disk.flush()
        os.fsync(disk.fileno())
        service.start(found.config)
        wait_until(
            lambda: "it is another disk" in (found.status()["held"]["problem"] or ""), timeout=30, what="it is said"
        )
        assert found.status()["state"] == "stalled"
        with pytest.raises(PreconditionError, match="it is another disk") as told:
            api.up(found.name)
        assert f"pgcdp up {found.name} --remake data" in str(told.value.hint)
        disk.seek(0)
        disk.write(head)
        disk.flush()
        os.fsync(disk.fileno())
    wait_until(found.capturing, timeout=60, what="it goes on by itself")
    assert rows(found) == 10000
    found.wait_following()
    api.cut(found.name)
    api.down(found.name)
    found.assert_volume_is_newest()
