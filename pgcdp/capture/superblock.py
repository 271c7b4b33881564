"""What a filesystem on a plain backing tells of itself: its superblock, and how far its log is. Nothing is mounted.

ext4: `struct ext4_super_block` at byte 1024, and the journal's superblock (`journal_superblock_s`, jbd2.h), which lies
in the first block of inode 8. Whoever mounts it to write raises the mount count and the times in the one and the
sequence number in the other. xfs: `struct xfs_dsb` at byte 0, and the place in the log where the cycle number changes
(xlog_find_head in the kernel), since its superblock does not tell of mounts. Replaying a log changes both kinds.
"""

from __future__ import annotations

import mmap
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pgcdp.records import BLOCK

Read = Callable[[int, int], bytes]
"""(offset, length) -> the bytes there, as many as asked for."""

_EXT4_MAGIC, _JOURNAL_MAGIC, _EXTENT_MAGIC = 0xEF53, 0xC03B3998, 0xF30A
_XFS_RECORD = b"\xfe\xed\xba\xbe"
_SECTOR = 512
"""Unit of xfs's log."""
_AROUND_HEAD = 64
"""So many sectors before and behind the head of xfs's log are compared; each mount that writes leaves at least two."""


@dataclass(frozen=True, slots=True)
class LogHead:
    """Where a filesystem's log goes on: `head` is ext4's next sequence number, or xfs's "CYCLE:SECTOR".

    `checksum`: of ext4's whole journal superblock, or of xfs's log around its head; 16 hex digits of XXH3-64.
    """

    head: str
    checksum: str


@dataclass(frozen=True, slots=True)
class Superblock:
    """`fs` is "ext4", "xfs" or "" for none of them; `checksum` is that of the superblock's bytes.

    Of ext4 only: `mounts` is its mount count, `mounted_s`, `written_s` and `checked_s` are times in seconds since 1970,
    0 for never, `mounted_at` is where it was mounted last. `log`: None when it lies elsewhere, or cannot be found.
    """

    fs: str
    uuid: str
    checksum: str
    log: LogHead | None = None
    mounts: int = 0
    mounted_s: int = 0
    written_s: int = 0
    checked_s: int = 0
    mounted_at: str = ""


@contextmanager
def reading(backing: Path) -> Iterator[Read]:
    """Read a backing as it is on its disk, past any cache. Raises OSError, also for bytes behind its end."""
    fd = os.open(backing, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def read(offset: int, length: int) -> bytes:
        begin, end = offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK
        with mmap.mmap(-1, end - begin) as page:
            got = os.preadv(fd, [page], begin)
            if got < offset + length - begin:
                raise OSError(f"{backing} ends at byte {begin + got}")
            return page[offset - begin : offset - begin + length]

    try:
        yield read
    finally:
        os.close(fd)


def read_superblock(read: Read) -> Superblock:
    """What filesystem there is."""
    head = read(0, BLOCK)
    kind, sb = _kind(head)
    if kind == "xfs":
        return _xfs(read, head)
    if kind == "ext4":
        return _ext4(read, sb)
    return Superblock("", "", checksum(head))


def _kind(head: bytes) -> tuple[str, bytes]:
    """Which filesystem the first block of a device begins, and its superblock; "" for none."""
    if head[:4] == b"XFSB":
        return "xfs", head
    sb = head[1024:2048]
    return ("ext4" if int.from_bytes(sb[0x38:0x3A], "little") == _EXT4_MAGIC else ""), sb


def identity(read: Read) -> str:
    """Kind and UUID of the filesystem, which stay as they are as long as it lives; "" when there is none.

    They lie in one sector each, so that no torn write of a superblock makes them others.
    """
    kind, sb = _kind(read(0, BLOCK))
    place = {"xfs": 32, "ext4": 0x68}.get(kind)
    return "" if place is None else f"{kind} {uuid.UUID(bytes=sb[place : place + 16])}"


def filesystem_bytes(read: Read) -> int:
    """How large the filesystem is, with all that is its own; 0 when there is none."""
    kind, sb = _kind(read(0, BLOCK))
    if kind == "xfs":
        return int.from_bytes(sb[4:8], "big") * int.from_bytes(sb[8:16], "big")
    if not kind:
        return 0
    blocks = int.from_bytes(sb[4:8], "little")
    if int.from_bytes(sb[0x60:0x64], "little") & 0x80:  # 64bit
        blocks |= int.from_bytes(sb[0x150:0x154], "little") << 32
    return blocks * (1024 << int.from_bytes(sb[0x18:0x1C], "little"))


def checksum(data: bytes) -> str:
    """XXH3-64 as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


# --- ext4


def _ext4(read: Read, sb: bytes) -> Superblock:
    def time_at(low: int, high: int) -> int:
        return int.from_bytes(sb[low : low + 4], "little") | sb[high] << 32

    return Superblock(
        fs="ext4",
        uuid=str(uuid.UUID(bytes=sb[0x68:0x78])),
        checksum=checksum(sb),
        log=_ext4_log(read, sb),
        mounts=int.from_bytes(sb[0x34:0x36], "little"),
        mounted_s=time_at(0x2C, 0x275),
        written_s=time_at(0x30, 0x274),
        checked_s=time_at(0x40, 0x277),
        mounted_at=sb[0x88:0xC8].split(b"\0")[0].decode("utf-8", "backslashreplace"),
    )


def _ext4_log(read: Read, sb: bytes) -> LogHead | None:
    """The journal's superblock, found by the extents of its inode, which lies in the first group."""
    block = 1024 << int.from_bytes(sb[0x18:0x1C], "little")
    number = int.from_bytes(sb[0xE0:0xE4], "little")
    if not number or int.from_bytes(sb[0x5C:0x60], "little") & 0x4 == 0:  # has_journal
        return None
    descriptor = read((int.from_bytes(sb[0x14:0x18], "little") + 1) * block, 64)
    wide = int.from_bytes(sb[0x60:0x64], "little") & 0x80 and int.from_bytes(sb[0xFE:0x100], "little") > 32  # 64bit
    table = int.from_bytes(descriptor[8:12], "little")
    table |= int.from_bytes(descriptor[0x28:0x2C], "little") << 32 if wide else 0
    inode = read(table * block + (number - 1) * int.from_bytes(sb[0x58:0x5A], "little"), 128)
    node = inode[40:100]
    for _ in range(6):
        magic, entries, _, depth = struct.unpack_from("<4H", node)
        if magic != _EXTENT_MAGIC or not entries:
            return None
        if not depth:
            break
        low, high = struct.unpack_from("<IH", node, 12 + 4)
        node = read((low | high << 32) * block, block)
    high, low = struct.unpack_from("<HI", node, 12 + 6)
    found = read((low | high << 32) * block, block)
    if int.from_bytes(found[:4], "big") != _JOURNAL_MAGIC:
        return None
    return LogHead(str(int.from_bytes(found[24:28], "big")), checksum(found))


# --- xfs


def _xfs(read: Read, sb: bytes) -> Superblock:
    size = int.from_bytes(sb[102:104], "big")
    return Superblock("xfs", str(uuid.UUID(bytes=sb[32:48])), checksum(sb[: min(size, BLOCK)]), _xfs_log(read, sb))


def _xfs_log(read: Read, sb: bytes) -> LogHead | None:
    block, group_blocks, group_log = int.from_bytes(sb[4:8], "big"), int.from_bytes(sb[84:88], "big"), sb[124]
    start, blocks = int.from_bytes(sb[48:56], "big"), int.from_bytes(sb[96:100], "big")
    if not start or not blocks:
        return None  # on another device
    begin = ((start >> group_log) * group_blocks + (start & ((1 << group_log) - 1))) * block
    sectors = blocks * block // _SECTOR

    def cycle(sector: int) -> int:
        found = read(begin + sector * _SECTOR, 8)
        return int.from_bytes(found[4:] if found[:4] == _XFS_RECORD else found[:4], "big")

    first, last = cycle(0), cycle(sectors - 1)
    head = 0
    if first != last:  # sectors from the head on have the cycle of the last one, those before it that of the first
        low, head = 0, sectors - 1
        while head - low > 1:
            middle = (low + head) // 2
            low, head = (middle, head) if cycle(middle) == first else (low, middle)
    around = [read(begin + (head + at) % sectors * _SECTOR, _SECTOR) for at in range(-_AROUND_HEAD, _AROUND_HEAD)]
    return LogHead(f"{first}:{head}", checksum(b"".join(around)))
