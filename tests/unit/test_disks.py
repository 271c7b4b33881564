"""Store and journal on one disk, hidden behind partitions, LVM, RAID, loop devices or btrfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pgcdp.capture import disks
from pgcdp.capture.volumes import Mount

SDA, SDA1, SDB, SDB1, DM0, DM1, MD0 = (
    os.makedev(*each) for each in ((8, 0), (8, 1), (8, 16), (8, 17), (253, 0), (253, 1), (9, 0))
)


class Machine:
    """A tree as the kernel lays sysfs out: /sys/devices with directories, /sys/dev/block with links to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dev/block").mkdir(parents=True)

    def device(self, place: str, number: int, *, slaves: tuple[Path, ...] = ()) -> Path:
        node = self.root / "devices" / place
        (node / "slaves").mkdir(parents=True)
        name = f"{os.major(number)}:{os.minor(number)}"
        (node / "dev").write_text(f"{name}\n")
        (self.root / "dev/block" / name).symlink_to(node)
        for slave in slaves:
            (node / "slaves" / slave.name).symlink_to(slave)
        return node

    def partition(self, disk: Path, name: str, number: int) -> Path:
        node = self.device(f"{disk.relative_to(self.root / 'devices')}/{name}", number)
        (node / "partition").write_text("1\n")
        return node

    def disks(self, number: int, place: str = "/", mounted: tuple[Mount, ...] = ()) -> set[str]:
        return set(disks.below(number, place, list(mounted), self.root).disks)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_two_partitions_are_on_one_disk(machine: Machine) -> None:
    sda = machine.device("pci0/block/sda", SDA)
    machine.partition(sda, "sda1", SDA1)
    assert machine.disks(SDA1) == machine.disks(SDA) == {"sda"}


def test_a_logical_volume_is_on_the_disks_of_its_group(machine: Machine) -> None:
    """Through an encrypted device, too: that is another layer of device-mapper."""
    sda, sdb = machine.device("pci0/block/sda", SDA), machine.device("pci0/block/sdb", SDB)
    one = machine.partition(sda, "sda1", SDA1)
    crypt = machine.device("virtual/block/dm-0", DM0, slaves=(one,))
    machine.device("virtual/block/dm-1", DM1, slaves=(crypt, sdb))
    assert machine.disks(DM1) == {"sda", "sdb"}
    assert disks.below(DM1, "/", [], machine.root).passed == {DM1, DM0, SDA1, SDA, SDB}


def test_a_raid_is_on_all_of_its_disks(machine: Machine) -> None:
    sda, sdb = machine.device("pci0/block/sda", SDA), machine.device("pci0/block/sdb", SDB)
    machine.device("virtual/block/md0", MD0, slaves=(sda, sdb))
    assert machine.disks(MD0) == {"sda", "sdb"}


def test_a_filesystem_without_a_device_is_itself(machine: Machine) -> None:
    memory = Mount(Path("/run"), "tmpfs", "tmpfs", frozenset())
    share = Mount(Path("/backup"), "nfs4", "nas:/export", frozenset())
    under = disks.below(os.makedev(0, 40), "/run/store", [memory, share], machine.root)
    assert (set(under.disks), under.in_memory) == ({"tmpfs on /run"}, True)
    under = disks.below(os.makedev(0, 41), "/backup/main", [memory, share], machine.root)
    assert (set(under.disks), under.in_memory) == ({"nfs4 nas:/export"}, False)


def test_two_datasets_of_zfs_are_in_one_pool(machine: Machine) -> None:
    mounted = [Mount(Path(f"/{name}"), "zfs", f"tank/{name}", frozenset()) for name in ("store", "journal")]
    found = [disks.below(os.makedev(0, 50 + n), f"/{name}/x", mounted, machine.root).disks
             for n, name in enumerate(("store", "journal"))]  # fmt: skip
    assert found == [{"zfs pool tank"}, {"zfs pool tank"}]


def test_the_longest_and_topmost_mount_counts(machine: Machine) -> None:
    mounted = [
        Mount(Path("/"), "overlay", "overlay", frozenset()),
        Mount(Path("/srv"), "nfs", "old:/x", frozenset()),
        Mount(Path("/srv"), "nfs", "new:/x", frozenset()),
        Mount(Path("/srvother"), "nfs", "other:/x", frozenset()),
    ]
    assert machine.disks(os.makedev(0, 60), "/srv/store", tuple(mounted)) == {"nfs new:/x"}


def test_devices_that_go_round_in_a_circle_end(machine: Machine) -> None:
    node = machine.device("virtual/block/dm-0", DM0)
    (node / "slaves/dm-0").symlink_to(node)
    assert machine.disks(DM0) == set()


def test_a_disk_that_sysfs_does_not_show_is_still_told_apart_from_others(machine: Machine) -> None:
    """In a container /sys may lack it: two devices of different numbers are not the same disk then."""
    assert machine.disks(SDA) == {"8:0"}
    assert machine.disks(SDB) == {"8:16"}


def test_store_and_journal_in_one_directory_are_on_one_disk(tmp_path: Path) -> None:
    """Whatever this machine's disks are."""
    (found,) = disks.apart(tmp_path, tmp_path, {})
    assert found.level == "warning"
    assert "store and journal" in found.detail
    assert "another disk" in (found.hint or "")


def test_what_lies_in_memory_is_told() -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or not disks.under(memory).in_memory:
        pytest.skip("no filesystem in memory here")
    assert "warning" in [each.level for each in disks.apart(memory, Path("/"), {}) if "in memory" in each.detail]
