"""What a journal's bitmap of changed blocks says of a gap that may have no record yet (FORMAT.md 1.8)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pgcdp.capture.journal import Journal, Tracking
from pgcdp.errors import DamageError
from pgcdp.records import BLOCK, Gap

NAME = "tracked"
IDLE, TRACKING = 0, 1
_HEAD = struct.Struct("<8sII16sQQQQIIQ")
_CHECKSUM_AT = 72
_SIZES_AT = 80
_SECTOR, _SECTORS, _SECTOR_HEAD = 512, 8, 12
"""Bytes of a sector of the bitmap, sectors of a page, bytes of a sector in front of its bits."""
_SECTOR_BLOCKS = 4000


def unrecorded_gap(journal: Journal) -> Gap | None:
    """The gap that goes on while changes are tracked or brought in: it begins behind the journal's last write.

    None when nothing is tracked. While the set heals its begin record is in the journal, unless that could not be
    written any more. Where the bitmap is lost, the applied mark tells.
    """
    told = _told(journal)
    return Gap(told.behind + 1, None, "untracked", told.since_ns, None, 0) if told is not None else None


def marked_blocks(journal: Journal) -> list[NDArray[np.bool_]] | None:
    """Of each volume, whether a block may hold what the journal lacks. Empty when nothing is tracked.

    A sector of the bitmap that is not what was written counts as all set. None: each block of each volume may.
    """
    if _told(journal) is None:
        return []
    slot = _newest_slot(journal.directory)
    if slot is None:
        return None
    count = int(_HEAD.unpack_from(slot)[8])
    found, page = [], 0
    with (journal.directory / NAME).open("rb") as file:
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


def _told(journal: Journal) -> Tracking | None:
    """What is said of a gap; None when nothing is tracked, or it is not known: the start of capture tells then."""
    slot = _newest_slot(journal.directory)
    if slot is not None:
        _, _, state, _, _, *told = _HEAD.unpack_from(slot)
        return Tracking(state, *told[:3]) if state != IDLE else None
    try:
        mark = journal.applied_mark()
    except DamageError:
        return None
    return None if mark is None else mark.tracking


def _newest_slot(journal: Path) -> bytes | None:
    """The newer one of those that are what was written; None without any."""
    try:
        with (journal / NAME).open("rb") as file:
            content = file.read(2 * BLOCK)
    except FileNotFoundError:
        return None
    slots = [slot for slot in (content[:BLOCK], content[BLOCK:]) if _right(slot)]
    return max(slots, key=lambda slot: int(_HEAD.unpack_from(slot)[4])) if slots else None


def _right(slot: bytes) -> bool:
    if len(slot) != BLOCK or slot[:8] != b"PGCDPTRK":
        return False
    zeroed = slot[:_CHECKSUM_AT] + bytes(8) + slot[_CHECKSUM_AT + 8 :]
    return xxhash.xxh3_64_intdigest(zeroed) == int.from_bytes(slot[_CHECKSUM_AT : _CHECKSUM_AT + 8], "little")
