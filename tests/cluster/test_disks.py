"""On which disk something lies, through what this machine has: loop devices, partitions, device-mapper, mounts."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pgcdp import proc
from pgcdp.capture import disks, volumes
from tests.waiting import wait_until


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pgcdp-disks-", dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def image(path: Path, size: int = 32 << 20) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def loop(file: Path, undo: ExitStack, *options: str) -> Path:
    device = Path(proc.run(["losetup", "--find", "--show", *options, str(file)]).stdout.strip())
    undo.callback(volumes.detach_loop, device)  # waits: a copy of its mount keeps it, and what its file lies on
    return device


def mounted(device: Path, mountpoint: Path, undo: ExitStack) -> Path:
    proc.run(["mkfs.ext4", "-q", str(device)])
    mountpoint.mkdir()
    proc.run(["mount", str(device), str(mountpoint)])
    undo.callback(proc.run, ["umount", str(mountpoint)])
    return mountpoint


def test_a_filesystem_on_a_loop_device_is_on_the_disk_of_its_file(place: Path, undo: ExitStack) -> None:
    """Two layers of it: store and journal that look like two disks and are one."""
    below = disks.under(place)
    outer = mounted(loop(image(place / "outer", 96 << 20), undo), place / "a", undo)
    inner = mounted(loop(image(outer / "inner"), undo), place / "b", undo)
    assert disks.under(outer).disks == disks.under(inner).disks == below.disks
    assert outer.stat().st_dev in disks.under(inner).passed
    other = mounted(loop(image(place / "other"), undo), place / "c", undo)
    (found,) = disks.apart(inner, other, {})
    assert found.level == "warning"


def test_a_journal_on_the_protected_volume_is_found_whatever_leads_there(place: Path, undo: ExitStack) -> None:
    """By its path, by a bind mount, by a loop device over a file there."""
    volume = mounted(loop(image(place / "volume", 96 << 20), undo), place / "pgdata", undo)
    elsewhere = place / "journal"
    elsewhere.mkdir()

    def levels(journal: Path) -> list[str]:
        return [each.level for each in disks.inside({"journal": journal}, [volume])]

    assert levels(elsewhere) == ["ok"]
    (volume / "journal").mkdir()
    assert levels(volume / "journal") == ["failure"]
    proc.run(["mount", "--bind", str(volume / "journal"), str(elsewhere)])
    undo.callback(proc.run, ["umount", str(elsewhere)])
    assert levels(elsewhere) == ["failure"]
    inside = mounted(loop(image(volume / "image"), undo), place / "inside", undo)
    assert levels(inside) == ["failure"]


def test_a_partition_is_on_its_disk(place: Path, undo: ExitStack) -> None:
    disk = image(place / "disk")
    entry = struct.pack("<B3sB3sII", 0, b"\0" * 3, 0x83, b"\0" * 3, 2048, 32768)
    with disk.open("r+b") as file:
        file.seek(446)
        file.write(entry + bytes(48) + b"\x55\xaa")
    device = loop(disk, undo, "--partscan")
    part = Path(f"{device}p1")
    try:
        wait_until(part.exists, timeout=5, what=f"the partition {part}")
    except TimeoutError:
        pytest.skip("this kernel reads no partitions of loop devices")
    assert disks.under(part).disks == disks.under(device).disks == disks.under(place).disks
    assert device.stat().st_rdev in disks.under(part).passed


@pytest.mark.skipif(not os.path.exists("/dev/mapper/control"), reason="no device-mapper here")
def test_a_mapped_device_is_on_the_disks_below_it(place: Path, undo: ExitStack) -> None:
    device = loop(image(place / "disk"), undo)
    name = f"pgcdp-test-{os.getpid()}"
    made = subprocess.run(["dmsetup", "create", name, "--table", f"0 32768 linear {device} 0"], check=False)
    if made.returncode:
        pytest.skip("dmsetup cannot make a device here")
    undo.callback(proc.run, ["dmsetup", "remove", name])
    mapped = Path("/dev/mapper") / name
    wait_until(mapped.exists, what=f"the device {mapped}")
    assert disks.under(mapped).disks == disks.under(place).disks
    assert device.stat().st_rdev in disks.under(mapped).passed
