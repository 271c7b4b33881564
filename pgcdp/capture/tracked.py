"""What a journal's bitmap of changed blocks says of a gap that may have no record yet (FORMAT.md 1.8)."""

from __future__ import annotations

import struct
from pathlib import Path

import xxhash

from pgcdp.errors import DamageError
from pgcdp.records import BLOCK, Gap

NAME = "tracked"
IDLE = 0
_HEAD = struct.Struct("<8sII16sQQQQIIQ")
_CHECKSUM_AT = 72


def unrecorded_gap(journal: Path) -> Gap | None:
    """The gap that goes on while changes are tracked or brought in: it begins behind the journal's last write.

    None when nothing is tracked. While the set heals its begin record is in the journal, unless that could not be
    written any more. Raises DamageError when both slots are not what was written.
    """
    try:
        with (journal / NAME).open("rb") as file:
            content = file.read(2 * BLOCK)
    except FileNotFoundError:
        return None
    slots = [_HEAD.unpack_from(slot) for slot in (content[:BLOCK], content[BLOCK:]) if _right(slot)]
    if not slots:
        raise DamageError(
            f"{journal / NAME} is damaged: neither slot, at offset 0 and {BLOCK}, is what was written",
            "it says which blocks the journal lacks; docs/operations.md tells how to go on without it",
        )
    _, _, state, _, _, since, behind, *_ = max(slots, key=lambda slot: int(slot[4]))
    return Gap(behind + 1, None, "untracked", since, None, 0) if state != IDLE else None


def _right(slot: bytes) -> bool:
    if len(slot) != BLOCK or slot[:8] != b"PGCDPTRK":
        return False
    zeroed = slot[:_CHECKSUM_AT] + bytes(8) + slot[_CHECKSUM_AT + 8 :]
    return xxhash.xxh3_64_intdigest(zeroed) == int.from_bytes(slot[_CHECKSUM_AT : _CHECKSUM_AT + 8], "little")
