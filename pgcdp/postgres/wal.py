"""WAL records as the engine passes them on: their blocks with images and data, and what they mean.

Formats: src/include/access/xlogrecord.h, heapam_xlog.h, catalog/pg_control.h, replication/message.h and
commands/dbcommands_xlog.h of PostgreSQL 13 to 18. The engine has checked each record's CRC.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from mmap import mmap

import numpy as np
import zstandard

from pgcdp.errors import DamageError
from pgcdp.records import NOTE

PAGE = 8192
MAGIC_15 = 0xD110
MAGIC_18 = 0xD118


class Manager(IntEnum):
    """Resource managers (rmgrlist.h)."""

    XLOG = 0
    DBASE = 4
    TBLSPC = 5
    RELMAP = 7
    HEAP2 = 9
    HEAP = 10
    LOGICALMSG = 21
    MARK = 254
    LOST = 255


@dataclass(frozen=True, slots=True)
class Note:
    """A record: where it is, which write completed it and where in that write it begins and ends, its body."""

    lsn: int
    end_lsn: int
    write: int
    begin_at: int
    end_at: int
    timeline: int
    xid: int
    magic: int
    rmid: int
    info: int
    body: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A block reference: the page's image if there is one (None if it cannot be unpacked), and its data."""

    tablespace: int
    database: int
    file: int
    fork: int
    number: int
    has_image: bool
    image: bytes | None
    data: bytes


@dataclass(frozen=True, slots=True)
class Parts:
    """Blocks and main data of a record."""

    blocks: list[Block]
    main: bytes


_FIELDS = ("lsn", "end_lsn", "write", "begin_at", "end_at", "timeline", "xid", "magic", "rmid", "info")


def read_notes(raw: bytes) -> list[Note]:
    """The records in a file `notes` (FORMAT.md 4.1). Raises DamageError when it ends inside one."""
    return list(_notes(raw))


def first_notes(raw: bytes | mmap, limit: int) -> tuple[list[Note], int]:
    """The same, but of a database's own catalogs nothing behind the first `limit` records; how many were left out.

    What comes later must not be understood from pages that lack what came between.
    """
    kept: list[Note] = []
    left_out = 0
    for note in _notes(raw):
        if len(kept) >= limit and of_database(note):
            left_out += 1
        else:
            kept.append(note)
    return kept, left_out


def of_database(note: Note) -> bool:
    """Whether a record changes pages of catalogs that each database has for itself."""
    if note.rmid not in (Manager.HEAP, Manager.HEAP2, Manager.XLOG):
        return False
    try:
        return any(block.database for block in parse(note, images=False).blocks)
    except DamageError:
        return True


def _notes(raw: bytes | mmap) -> Iterator[Note]:
    at = 0
    while at < len(raw):
        if len(raw) - at < NOTE.itemsize:
            raise DamageError(f"the notes end at offset {len(raw)}, inside a record")
        head = np.frombuffer(raw, NOTE, 1, at)[0]
        begin = at + NOTE.itemsize
        length = int(head["body_length"])
        if len(raw) < begin + length:
            raise DamageError(f"the notes end at offset {len(raw)}, inside the record at {at}")
        yield Note(**{name: int(head[name]) for name in _FIELDS}, body=raw[begin : begin + length])
        at = begin + (length + 7) // 8 * 8


def pack_notes(notes: list[Note]) -> bytes:
    """The same records as a file again."""
    parts = []
    for note in notes:
        head = np.zeros(1, dtype=NOTE)
        for name in _FIELDS:
            head[name] = getattr(note, name)
        head["body_length"] = len(note.body)
        parts += [head.tobytes(), note.body, bytes(-len(note.body) % 8)]
    return b"".join(parts)


# --- the body of a record


@dataclass(slots=True)
class _Head:
    """What precedes a block's bytes."""

    relation: tuple[int, int, int]
    fork: int
    number: int
    data_length: int
    image_length: int = -1
    hole: tuple[int, int] = (0, 0)
    codec: str = ""


def parse(note: Note, images: bool = True) -> Parts:
    """Take a body apart, without unpacking `images` if so. Raises DamageError when it contradicts itself."""
    try:
        return _parse(note, images)
    except (struct.error, IndexError):
        raise DamageError(f"the record at LSN {note.lsn:X} contradicts itself") from None


def _parse(note: Note, images: bool) -> Parts:
    body, at = note.body, 0
    heads: list[_Head] = []
    behind = main_length = 0
    while len(body) - at > behind:
        number = body[at]
        if number <= 32:
            head, at = _block_head(note, at + 1, heads[-1].relation if heads else (0, 0, 0))
            heads.append(head)
            behind += head.data_length + max(0, head.image_length)
        elif number in (255, 254):
            short = number == 255
            main_length = body[at + 1] if short else struct.unpack_from("<I", body, at + 1)[0]
            at += 2 if short else 5
            behind += main_length
            break
        elif number in (253, 252):
            at += 3 if number == 253 else 5
        else:
            raise IndexError
    if len(body) - at != behind:
        raise IndexError
    blocks = []
    for head in heads:
        image = None
        if head.image_length >= 0:
            image = _page(body[at : at + head.image_length], head) if images else None
            at += head.image_length
        data = body[at : at + head.data_length]
        at += head.data_length
        blocks.append(Block(*head.relation, head.fork, head.number, head.image_length >= 0, image, data))
    return Parts(blocks, body[at : at + main_length])


def _block_head(note: Note, at: int, last: tuple[int, int, int]) -> tuple[_Head, int]:
    body = note.body
    flags, data_length = body[at], struct.unpack_from("<H", body, at + 1)[0]
    at += 3
    head = _Head(last, flags & 0x0F, 0, data_length)
    if flags & 0x10:
        head.image_length, hole_at, info = struct.unpack_from("<HHB", body, at)
        at += 5
        head.codec = _codec(note.magic, info)
        hole_length = 0
        if info & 1:
            if head.codec:
                hole_length = struct.unpack_from("<H", body, at)[0]
                at += 2
            else:
                hole_length = PAGE - head.image_length
        head.hole = (hole_at, hole_length)
    if not flags & 0x80:
        head.relation = struct.unpack_from("<III", body, at)
        at += 12
    head.number = struct.unpack_from("<I", body, at)[0]
    return head, at + 4


def _codec(magic: int, info: int) -> str:
    if magic < MAGIC_15:
        return "pglz" if info & 2 else ""
    return "pglz" if info & 4 else "lz4" if info & 8 else "zstd" if info & 16 else ""


def _page(stored: bytes, head: _Head) -> bytes | None:
    """The page of an image; None for a codec that cannot be read here."""
    hole_at, hole_length = head.hole
    wanted = PAGE - hole_length
    if head.codec == "pglz":
        raw = pglz(stored, wanted)
    elif head.codec == "zstd":
        raw = zstandard.ZstdDecompressor().decompress(stored, max_output_size=wanted)
    elif head.codec == "lz4":
        raw = lz4_block(stored, wanted)
    else:
        raw = stored
    if len(raw) != wanted:
        return None
    return raw[:hole_at] + bytes(hole_length) + raw[hole_at:]


def pglz(stored: bytes, length: int) -> bytes:
    """Unpack PostgreSQL's own compression (src/common/pg_lzcompress.c): at most `length` bytes."""
    out = bytearray()
    at = 0
    while at < len(stored) and len(out) < length:
        control = stored[at]
        at += 1
        for bit in range(8):
            if at >= len(stored) or len(out) >= length:
                break
            if not control >> bit & 1:
                out.append(stored[at])
                at += 1
                continue
            size = (stored[at] & 0x0F) + 3
            back = (stored[at] & 0xF0) << 4 | stored[at + 1]
            at += 2
            if size == 18:
                size += stored[at]
                at += 1
            _repeat(out, back, min(size, length - len(out)))
    return bytes(out)


def lz4_block(stored: bytes, length: int) -> bytes:
    """Unpack an LZ4 block (lz4_Block_format.md): at most `length` bytes."""
    out = bytearray()
    at = 0

    def more(start: int, at: int) -> tuple[int, int]:
        size = start
        while start == 15:
            size += stored[at]
            at += 1
            if stored[at - 1] != 255:
                break
        return size, at

    while at < len(stored):
        token = stored[at]
        literals, at = more(token >> 4, at + 1)
        out += stored[at : at + literals]
        at += literals
        if at >= len(stored):
            break
        back = stored[at] | stored[at + 1] << 8
        size, at = more(token & 15, at + 2)
        _repeat(out, back, min(size + 4, length - len(out)))
    return bytes(out)


def _repeat(out: bytearray, back: int, size: int) -> None:
    if back == 0 or back > len(out):
        raise IndexError
    for _ in range(size):
        out.append(out[-back])


# --- what some records say


def restore_point(note: Note) -> str | None:
    """The name that pg_create_restore_point gave, if it is its record (xl_restore_point: time, char[64])."""
    if note.rmid != Manager.XLOG or note.info & 0xF0 != 0x70:
        return None
    return parse(note).main[8:72].split(b"\0")[0].decode("utf-8", "replace")


def is_checkpoint(note: Note) -> bool:
    """Whether it is the record of a checkpoint, online or of a shutdown."""
    return note.rmid == Manager.XLOG and note.info & 0xF0 in (0x00, 0x10)


def timeline_of(note: Note) -> int | None:
    """The timeline from a checkpoint or an end of recovery on (CheckPoint, xl_end_of_recovery), if it is its record."""
    if note.rmid != Manager.XLOG or note.info & 0xF0 not in (0x00, 0x10, 0x90):
        return None
    return int(struct.unpack_from("<I", parse(note).main, 8)[0])


def opened_timeline(note: Note) -> int:
    """The timeline that the checkpoint opens with which recovery ended (CheckPoint: PrevTimeLineID); 0: it is none."""
    if not is_checkpoint(note):
        return 0
    timeline, before = struct.unpack_from("<II", parse(note).main, 8)
    return int(timeline) if timeline != before else 0


def message(note: Note) -> tuple[bool, str] | None:
    """(transactional, text) of a logical message of pgcdp (xl_logical_message), if it is one."""
    if note.rmid != Manager.LOGICALMSG:
        return None
    main = parse(note).main
    prefix, size = struct.unpack_from("<QQ", main, 8)
    return bool(main[4]), main[24 + prefix : 24 + prefix + size].decode("utf-8", "replace")


def dropped_database(note: Note) -> int | None:
    """OID of the database that a record removes (xl_dbase_drop_rec); its info is 0x10, from 15 on 0x20."""
    if note.rmid != Manager.DBASE or note.info & 0xF0 != (0x20 if note.magic >= MAGIC_15 else 0x10):
        return None
    return int(struct.unpack_from("<I", parse(note).main)[0])


def dropped_tablespace(note: Note) -> int | None:
    """OID of the tablespace that a record removes (xl_tblspc_drop_rec)."""
    if note.rmid != Manager.TBLSPC or note.info & 0xF0 != 0x10:
        return None
    return int(struct.unpack_from("<I", parse(note).main)[0])


def blank_wal(data: bytes, at: int, lsn: int) -> bytes:
    """A write's data with its WAL zero from `lsn` on, which lies `at` bytes from its beginning.

    To the end of that page, and all pages that follow it there in order of address. What else the write holds stays.
    """
    blank = bytearray(data)
    address = lsn // PAGE * PAGE
    while at < len(blank):
        end = min(len(blank), at + PAGE - lsn % PAGE)
        blank[at:end] = bytes(end - at)
        at, address = end, address + PAGE
        lsn = address
        if len(blank) - at < 16 or struct.unpack_from("<Q", blank, at + 8)[0] != address:
            break
    return bytes(blank)
