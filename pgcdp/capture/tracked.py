"""What a journal's bitmap of changed blocks says of a gap that may have no record yet (FORMAT.md 1.8)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pgcdp.errors import DamageError
from pgcdp.records import BLOCK, Gap

NAME = "tracked"
IDLE = 0
_HEAD = struct.Struct("<8sII16sQQQQIIQ")
_CHECKSUM_AT = 72
_SIZES_AT = 80
_SECTOR, _SECTORS, _SECTOR_HEAD = 512, 8, 12
"""Bytes of a sector of the bitmap, sectors of a page, bytes of a sector in front of its bits."""
_SECTOR_BLOCKS = 4000


def unrecorded_gap(journal: Path) -> Gap | None:
    """The gap that goes on while changes are tracked or brought in: it begins behind the journal's last write.

    None when nothing is tracked. While the set heals its begin record is in the journal, unless that could not be
    written any more. Raises DamageError when both slots are not what was written.
    """
    slot = _newest_slot(journal)
    if slot is None:
        return None
    _, _, state, _, _, since, behind, *_ = _HEAD.unpack_from(slot)
    return Gap(behind + 1, None, "untracked", since, None, 0) if state != IDLE else None


def marked_blocks(journal: Path) -> list[NDArray[np.bool_]]:
    """Of each volume, whether a block may hold what the journal lacks. Empty when nothing is tracked.

    A sector of the bitmap that is not what was written counts as all set. Raises DamageError as `unrecorded_gap`.
    """
    slot = _newest_slot(journal)
    if slot is None or _HEAD.unpack_from(slot)[2] == IDLE:
        return []
    count = int(_HEAD.unpack_from(slot)[8])
    found, page = [], 0
    with (journal / NAME).open("rb") as file:
        for (blocks,) in struct.iter_unpack("<Q", slot[_SIZES_AT : _SIZES_AT + 8 * count]):
            sectors = -(-blocks // (_SECTORS * _SECTOR_BLOCKS)) * _SECTORS
            file.seek(2 * BLOCK + page * BLOCK)
            content = file.read(sectors * _SECTOR)
            bits = [_bits(content[at * _SECTOR : (at + 1) * _SECTOR], page * _SECTORS + at) for at in range(sectors)]
            found.append(np.unpackbits(np.frombuffer(b"".join(bits), np.uint8), bitorder="little")[:blocks] != 0)
            page += sectors // _SECTORS
    return found


def _bits(sector: bytes, number: int) -> bytes:
    """Those of a sector; all set where it is not what was written."""
    whole = len(sector) == _SECTOR and int.from_bytes(sector[8:_SECTOR_HEAD], "little") == number
    if whole and xxhash.xxh3_64_intdigest(bytes(8) + sector[8:]) == int.from_bytes(sector[:8], "little"):
        return sector[_SECTOR_HEAD:]
    return b"\xff" * (_SECTOR - _SECTOR_HEAD)


def _newest_slot(journal: Path) -> bytes | None:
    """The newer one of those that are what was written; None without a file. Raises DamageError."""
    try:
        with (journal / NAME).open("rb") as file:
            content = file.read(2 * BLOCK)
    except FileNotFoundError:
        return None
    slots = [slot for slot in (content[:BLOCK], content[BLOCK:]) if _right(slot)]
    if not slots:
        raise DamageError(
            f"{journal / NAME} is damaged: neither slot, at offset 0 and {BLOCK}, is what was written",
            "it says which blocks the journal lacks; docs/operations.md tells how to go on without it",
        )
    return max(slots, key=lambda slot: int(_HEAD.unpack_from(slot)[4]))


def _right(slot: bytes) -> bool:
    if len(slot) != BLOCK or slot[:8] != b"PGCDPTRK":
        return False
    zeroed = slot[:_CHECKSUM_AT] + bytes(8) + slot[_CHECKSUM_AT + 8 :]
    return xxhash.xxh3_64_intdigest(zeroed) == int.from_bytes(slot[_CHECKSUM_AT : _CHECKSUM_AT + 8], "little")
