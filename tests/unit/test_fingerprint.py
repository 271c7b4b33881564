"""What of a plain filesystem tells that somebody wrote to it: superblocks and logs of real ones, nothing mounted."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp.capture.fingerprint import differences
from pgcdp.capture.superblock import LogHead, Superblock, read_superblock, reading

SIZES = {"ext4": 64 << 20, "xfs": 300 << 20}


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    """A filesystem in a sparse file."""

    def make(fs: str) -> Path:
        path = tmp_path / fs
        with path.open("wb") as file:
            file.truncate(SIZES[fs])
        words = {
            "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096"],
            "xfs": ["mkfs.xfs", "-q", "-f", "-K", "-s", "size=4096"],
        }
        subprocess.run([*words[fs], str(path)], check=True)
        return path

    return make


def look(path: Path) -> Superblock:
    with reading(path) as read:
        return read_superblock(read)


def poke(path: Path, at: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, at)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_volume_that_nobody_touched_is_the_same(made: Callable[[str], Path], fs: str) -> None:
    path = made(fs)
    before = look(path)
    assert before.fs == fs
    assert before.log is not None
    words = {"ext4": ["dumpe2fs", "-h"], "xfs": ["xfs_db", "-r", "-c", "sb"]}
    subprocess.run([*words[fs], str(path)], check=True, capture_output=True)
    assert [*differences(before, look(path))] == []


def test_the_journal_of_ext4_is_found_where_debugfs_says(made: Callable[[str], Path]) -> None:
    path = made("ext4")
    log = look(path).log
    assert log is not None
    told = subprocess.run(["debugfs", "-R", "stat <8>", str(path)], check=True, capture_output=True, text=True).stdout
    block = int(re.findall(r"\(0[^)]*\):(\d+)", told)[0])
    poke(path, block * 4096 + 24, (12345).to_bytes(4, "big"))  # s_sequence
    changed = look(path).log
    assert changed is not None
    assert changed.head == "12345"


def test_what_only_the_log_of_ext4_tells_is_seen(made: Callable[[str], Path]) -> None:
    """As when a superblock of before was put back, or its writing was lost."""
    path = made("ext4")
    before = look(path)
    told = subprocess.run(["debugfs", "-R", "stat <8>", str(path)], check=True, capture_output=True, text=True).stdout
    block = int(re.findall(r"\(0[^)]*\):(\d+)", told)[0])
    poke(path, block * 4096 + 24, (99).to_bytes(4, "big"))
    assert before.log is not None
    assert [*differences(before, look(path))] == [f"its log is at 99 instead of {before.log.head}"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune2fs", "-C", "7"], "mount count 7"),
        (["tune2fs", "-T", "20240102"], "was checked on 2024-01-02"),
        (["tune2fs", "-L", "other"], "superblock was written"),
        (["debugfs", "-w", "-R", "mkdir found"], "superblock was written"),
        (["e2fsck", "-f", "-y"], "was checked on"),
        (["tune2fs", "-U", "random"], "now holds ext4"),
    ],
)
def test_what_a_tool_did_to_ext4_is_seen_and_named(made: Callable[[str], Path], words: list[str], told: str) -> None:
    path = made("ext4")
    subprocess.run(["tune2fs", "-T", "20200101", str(path)], check=True, capture_output=True)
    before = look(path)
    subprocess.run([*words, str(path)], check=False, capture_output=True)
    assert told in "; ".join(differences(before, look(path)))


def test_what_was_written_to_the_log_of_xfs_is_seen(made: Callable[[str], Path]) -> None:
    """Its superblock does not tell of mounts."""
    path = made("xfs")
    before = look(path)
    out = subprocess.run(
        ["xfs_db", "-r", "-c", "sb 0", "-c", "p logstart agblocks agblklog", str(path)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    field = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", out)}
    group, block = divmod(field["logstart"], 1 << field["agblklog"])
    log = (group * field["agblocks"] + block) * 4096
    assert before.log is not None
    cycle, sector = map(int, before.log.head.split(":"))
    poke(path, log + sector * 512, cycle.to_bytes(4, "big") + bytes(508))  # one more sector of the same round
    now = look(path)
    assert now.checksum == before.checksum
    assert [*differences(before, now)] == [f"its log is at {cycle}:{sector + 1} instead of {cycle}:{sector}"]


def test_the_head_of_the_log_of_xfs_is_found_anywhere(made: Callable[[str], Path]) -> None:
    """In the second round, too: sectors before the head have the new cycle, those behind it the old one."""
    path = made("xfs")
    out = subprocess.run(
        ["xfs_db", "-r", "-c", "sb 0", "-c", "p logstart logblocks agblocks agblklog", str(path)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    field = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", out)}
    group, block = divmod(field["logstart"], 1 << field["agblklog"])
    log, sectors = (group * field["agblocks"] + block) * 4096, field["logblocks"] * 8
    for head in (1, 777, sectors - 1):
        cycles = [
            b"\xfe\xed\xba\xbe" + (2).to_bytes(4, "big") if at % 9 == 0 else (2).to_bytes(4, "big")
            for at in range(head)
        ]
        cycles += [(1).to_bytes(4, "big")] * (sectors - head)
        fd = os.open(path, os.O_RDWR)
        for at in {0, 1, 2, *range(max(0, head - 70), min(sectors, head + 70)), *range(0, sectors, 4096), sectors - 1}:
            os.pwrite(fd, cycles[at].ljust(512, b"x"), log + at * 512)
        for at in _searched(sectors, head):
            os.pwrite(fd, cycles[at].ljust(512, b"x"), log + at * 512)
        os.fsync(fd)
        os.close(fd)
        found = look(path).log
        assert found is not None
        assert found.head == f"2:{head}"


def _searched(sectors: int, head: int) -> list[int]:
    """Where a search for `head` by halves looks: the rest of the log stays a hole."""
    low, high, seen = 0, sectors - 1, []
    while high - low > 1:
        middle = (low + high) // 2
        seen.append(middle)
        low, high = (middle, high) if middle < head else (low, middle)
    return seen


def test_another_filesystem_or_none_is_said(made: Callable[[str], Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(bytes(1 << 20))
    before = look(made("ext4"))
    (told,) = differences(before, look(empty))
    assert "no filesystem that pgcdp knows" in told


def test_times_and_places_are_named() -> None:
    log = LogHead("7", "aa")
    before = Superblock("ext4", "u", "bb", log, 2, 1_700_000_000, 1_700_000_000, 0, "/pgdata")
    now = replace(before, checksum="cc", mounts=3, mounted_s=1_764_000_000, mounted_at="/mnt/rescue")
    mounted, written = differences(before, now)
    assert "mounted at /mnt/rescue on 2025-11-24T16:00:00" in mounted
    assert "mount count 3 instead of 2" in mounted
    assert "superblock was written on" in written
    (read,) = differences(before, replace(before, log=replace(log, checksum="dd")))
    assert read == "its log was written to at 7"
