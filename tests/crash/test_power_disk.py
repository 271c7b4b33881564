"""The power-cut device itself: it must lose what was not synced and never what was, or tests on it prove nothing."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import subprocess
from pathlib import Path

import pytest

from pgcdp.capture import volumes
from pgcdp.fsio import sync_directory
from tests.fix_engine import Direct
from tests.fix_power import Disk, Machine, MakeMachine
from tests.model import DISCARD, ZERO
from tests.raw_workload import erase

BLOCK = 4096
SECTOR = 512
MIB = 1 << 20


def block(number: int, version: int = 1) -> bytes:
    """A block of which each sector tells what it is."""
    return b"".join(b"%016d%08d%08d" % (number, version, sector) * (SECTOR // 32) for sector in range(BLOCK // SECTOR))


def durable(machine: Machine, name: str, number: int, versions: int = 1) -> set[int]:
    """Which versions of a block the sectors of a disk's backing hold; 0 is what it held before."""
    content = machine.backing(name).read_bytes()[number * BLOCK : (number + 1) * BLOCK]
    found = set()
    for sector in range(0, BLOCK, SECTOR):
        wanted = content[sector : sector + SECTOR]
        candidates = [0, *range(1, versions + 1)]
        match = [
            v for v in candidates if wanted == (block(number, v)[sector : sector + SECTOR] if v else bytes(SECTOR))
        ]
        assert match, f"sector {sector} of block {number} is nothing that was ever written"
        found.add(match[0])
    return found


def test_reads_show_what_only_the_cache_has(make_machine: MakeMachine) -> None:
    machine = make_machine(Disk("raw", MIB, None))
    with Direct(machine.device("raw")) as disk:
        disk.write(0, b"a" * 8 * BLOCK)
        erase(disk.fd, ZERO, BLOCK, BLOCK, device=True)
        erase(disk.fd, DISCARD, 3 * BLOCK, 2 * BLOCK, device=True)
        disk.write(4 * BLOCK, b"b" * BLOCK)
        expected = b"".join(letter * BLOCK for letter in (b"a", b"\0", b"a", b"\0", b"b", b"a", b"a", b"a", b"\0"))
        assert disk.read(0, 9 * BLOCK) == expected
        assert not any(machine.backing("raw").read_bytes())
        assert machine.status()["raw"]["unsynced"] == 4
        os.fsync(disk.fd)
    assert machine.backing("raw").read_bytes()[: 9 * BLOCK] == expected
    assert machine.status()["raw"]["unsynced"] == 0


def test_unsynced_writes_are_lost_torn_and_reordered_synced_ones_never(make_machine: MakeMachine) -> None:
    lost = torn = kept = reordered = 0
    for seed in range(8):
        machine = make_machine(Disk("raw", MIB, None))
        with Direct(machine.device("raw")) as disk:
            for number in range(1, 33):
                disk.write(number * BLOCK, block(number))
            os.fsync(disk.fd)
            for number in range(17, 65):
                disk.write(number * BLOCK, block(number, 2))
            for number in range(60, 65):
                disk.write(number * BLOCK, block(number, 3))
            told = machine.cut(seed)["raw"]
        assert told["unsynced"] == 48 + 5 == told["kept"] + told["torn"] + told["lost"]
        machine.off()
        assert all(durable(machine, "raw", number, 2) == {1} for number in range(1, 17)), "a synced block changed"
        states = [durable(machine, "raw", number, 3) for number in range(17, 65)]
        assert not any(0 in state for state in states[:16]), "a synced block is gone"
        lost += sum(2 not in state and 3 not in state for state in states)
        torn += sum(len(state) > 1 for state in states)
        kept += sum(state <= {2, 3} for state in states)
        arrived = [not state.isdisjoint({2, 3}) for state in states]
        reordered += arrived != sorted(arrived, reverse=True)
    assert min(lost, torn, kept, reordered) > 0, (lost, torn, kept, reordered)


def test_the_same_seed_makes_the_same_cut(make_machine: MakeMachine) -> None:
    contents = []
    for _ in range(2):
        machine = make_machine(Disk("raw", MIB, None))
        with Direct(machine.served("raw")) as disk:
            for number in range(64):
                disk.write(number * BLOCK, block(number))
            machine.cut(3)
        machine.off()
        contents.append(machine.backing("raw").read_bytes())
    assert contents[0] == contents[1]
    assert any(contents[0])


def test_without_power_every_request_fails(make_machine: MakeMachine) -> None:
    machine = make_machine(Disk("raw", MIB, None), Disk("other", MIB, None))
    for name in ("raw", "other"):
        with Direct(machine.device(name)) as disk:
            disk.write(0, block(0))
    machine.cut(1)
    for name in ("raw", "other"):
        with Direct(machine.served(name)) as disk:
            for action in (
                lambda: disk.write(0, block(0)),
                lambda: disk.read(0, BLOCK),
                lambda: os.fsync(disk.fd),
            ):
                with pytest.raises(OSError, match="Input/output error"):
                    action()
    machine.off()
    machine.on()
    with Direct(machine.device("raw")) as disk:
        disk.write(0, block(0, 2))
        assert disk.read(0, BLOCK) == block(0, 2)


def test_all_disks_lose_their_power_at_one_moment(make_machine: MakeMachine) -> None:
    """A counter that is synced to one disk and then to the other differs by one at most."""
    for seed in range(3):
        machine = make_machine(Disk("first", MIB, None), Disk("second", MIB, None))
        last = 20 + 7 * seed
        with Direct(machine.device("first")) as first, Direct(machine.device("second")) as second:
            machine.arm(seed, "second", last)
            with pytest.raises(OSError, match="Input/output error"):
                count_up([first, second])
            machine.fallen()
        machine.off()
        assert durable(machine, "first", 1, last) == {last}
        assert durable(machine, "second", 1, last) <= {last - 1, last}


def count_up(disks: list[Direct]) -> None:
    """Write and sync one number after the other to all disks in turn."""
    for version in itertools.count(1):
        for disk in disks:
            disk.write(BLOCK, block(1, version))
            os.fsync(disk.fd)


def test_a_full_cache_empties_itself_from_its_oldest_write(make_machine: MakeMachine) -> None:
    machine = make_machine(Disk("raw", MIB, None), cache=16 * BLOCK)
    with Direct(machine.device("raw")) as disk:
        for number in range(1, 41):
            disk.write(number * BLOCK, block(number))
        status = machine.status()["raw"]
    assert (status["unsynced"], status["unsynced_bytes"], status["evicted"]) == (16, 16 * BLOCK, 24)
    assert [durable(machine, "raw", number) for number in range(1, 41)] == [{1}] * 24 + [{0}] * 16


# --- filesystems on it


def write_files(place: Path, seed: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files that are synced, and files that were overwritten behind the last sync: their new contents by name."""
    rng = random.Random(seed)
    contents = {f"f{number}": rng.randbytes(rng.randint(1, 16) * BLOCK) for number in range(24)}
    for name, content in contents.items():
        (place / name).write_bytes(bytes(len(content)))
    volumes.sync_filesystem(place)
    synced, sent = dict(list(contents.items())[:12]), dict(list(contents.items())[12:])
    for name, content in contents.items():
        with (place / name).open("r+b") as file:
            file.write(content)
            file.flush()
            if name in synced:
                os.fsync(file.fileno())
            else:
                start_writing(file.fileno())
    return synced, sent


def start_writing(file: int) -> None:
    """sync_file_range: the data is with the disk, nothing was flushed."""
    before, write, after = 1, 2, 4
    assert ctypes.CDLL(None).sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), before | write | after) == 0


def assert_sound(machine: Machine, name: str, fs: str) -> None:
    """The filesystem's own check finds nothing wrong after its log was replayed. It must not be mounted."""
    check = ["e2fsck", "-f", "-n"] if fs == "ext4" else ["xfs_repair", "-n"]
    done = subprocess.run([*check, str(machine.device(name))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("fs", "tear"), [("ext4", 512), ("xfs", 4096)])
def test_synced_files_survive_and_others_need_not(make_machine: MakeMachine, fs: str, tear: int) -> None:
    machine = make_machine(Disk("files", 320 * MIB, fs), tear=tear)
    place = machine.place("files")
    whole = torn = gone = 0
    for seed in range(6):
        (place / str(seed)).mkdir()
        sync_directory(place)
        synced, sent = write_files(place / str(seed), seed)
        machine.cut(seed)
        machine.off()
        machine.on()
        for name, content in synced.items():
            assert (place / str(seed) / name).read_bytes() == content, f"{name} was synced"
        for name, content in sent.items():
            found = (place / str(seed) / name).read_bytes()
            assert len(found) == len(content)
            whole += found == content
            gone += not any(found)
            torn += found != content and any(found)
        volumes.unmount(place)
        assert_sound(machine, "files", fs)
        volumes.mount(machine.device("files").readlink(), place, fs)
    assert min(whole, torn, gone) > 0, (whole, torn, gone)
