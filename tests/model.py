"""An independent witness: what the bytes of a journal and of a store mean, from engine/FORMAT.md alone.

Imports nothing from pgcdp. Written for clarity: a segment is read whole, a volume is a bytearray. Whatever is not as
FORMAT.md says it must be raises `Wrong`; nothing is mended, skipped or guessed.

    journal = read_journal(directory)
    volumes = replay([baseline0, baseline1], journal.writes, 1234)   # the volumes' bytes after write 1234
    store = read_store(directory)
    store.image_at_boundary(3)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash
import zstandard

BLOCK = 4096
WRITE, ZERO, DISCARD, MARK = 1, 2, 3, 5


class Wrong(Exception):
    """Bytes that are not what FORMAT.md says."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Wrong(what)


def xxh3(data: bytes | bytearray | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def zeroed(data: bytes | memoryview, field: int) -> int:
    """XXH3-64 of `data` with the eight bytes at `field` as zero."""
    state = xxhash.xxh3_64(data[:field])
    state.update(bytes(8))
    state.update(data[field + 8 :])
    return state.intdigest()


def round_up(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


# ---- 1. Journal


@dataclass(frozen=True)
class Write:
    """One record. `data` is what a write wrote, or a mark's name; else empty."""

    number: int
    kind: int
    volume: int
    offset: int
    length: int
    wall_ns: int
    boot_ns: int
    data: bytes
    flags: int = 0


@dataclass(frozen=True)
class Batch:
    number: int
    first_write: int
    segment: int
    offset: int
    end: int
    previous: tuple[int, int]
    writes: list[Write]

    @property
    def last_write(self) -> int:
        return self.first_write + len(self.writes) - 1


@dataclass(frozen=True)
class Mark:
    """The applied mark (1.4)."""

    clean: bool
    set_id: bytes
    sequence: int
    applied: int
    released: int
    durable: int
    durable_batch: int
    durable_end: tuple[int, int]


@dataclass(frozen=True)
class Segment:
    path: Path
    sequence: int
    salt: int
    size: int
    set_id: bytes
    content: bytes


@dataclass(frozen=True)
class Journal:
    set_id: bytes | None
    segments: list[Segment]
    batches: list[Batch]
    mark: Mark | None

    @property
    def writes(self) -> list[Write]:
        return [write for batch in self.batches for write in batch.writes]

    @property
    def last_write(self) -> int:
        """0 when nothing was ever written."""
        if self.batches:
            return self.batches[-1].last_write
        return self.mark.durable if self.mark else 0


def read_segment(path: Path) -> Segment:
    """1.1. Raises Wrong for a bad header."""
    content = path.read_bytes()
    header = memoryview(content)[:BLOCK]
    require(len(header) == BLOCK, f"{path}: no header")
    magic, version, header_length, set_id, sequence, salt, size, _, checksum = struct.unpack_from(
        "<8sII16sQQQQQ", header
    )
    require(magic == b"PGCDPSEG" and version == 1 and header_length == BLOCK, f"{path}: not a segment")
    require(zeroed(header, 64) == checksum, f"{path}: header checksum")
    require(not any(header[72:]), f"{path}: reserved bytes")
    require(sequence == int(path.name[:16]), f"{path}: is segment {sequence}")
    require(size == len(content) and size % BLOCK == 0, f"{path}: {len(content)} bytes, header says {size}")
    return Segment(path, sequence, salt, size, set_id, content)


def read_batch(segment: Segment, offset: int) -> Batch | None:
    """1.2: the batch at `offset`, or None when none there is valid. Raises Wrong for a valid one without sense."""
    if offset + BLOCK > segment.size:
        return None
    view = memoryview(segment.content)[offset:]
    magic, salt, number, first_write, records, header_length, length, before, before_end, checksum = struct.unpack_from(
        "<8sQQQIIQQQQ", view
    )
    if magic != b"PGCDPBAT" or salt != segment.salt or records < 1 or header_length != round_up(72 + 48 * records):
        return None
    if length % BLOCK or length < header_length or length > segment.size - offset:
        return None
    if zeroed(view[:length], 64) != checksum:
        return None
    place = f"{segment.path.name} offset {offset}"
    writes = []
    at = header_length
    for i in range(records):
        kind, flags, volume, data_length, write, wall_ns, boot_ns, where, count = struct.unpack_from(
            "<BBHIQQQQQ", view, 72 + 48 * i
        )
        require(write == first_write + i, f"{place}: record {i} is write {write}")
        require(flags <= 4 * (kind == MARK), f"{place}: record {i} has flags {flags}")
        require(kind in (WRITE, ZERO, DISCARD, MARK), f"{place}: record {i} has kind {kind}")
        require(where % BLOCK == 0 and count % BLOCK == 0, f"{place}: write {write} is not of whole blocks")
        if kind == WRITE:
            require(data_length == count > 0, f"{place}: write {write} has {data_length} bytes for {count}")
        elif kind == MARK:
            require(where == count == 0 and volume == 65535, f"{place}: mark {write} has a place")
        else:
            require(data_length == 0 and count > 0, f"{place}: write {write} of kind {kind} has {data_length} bytes")
        data = bytes(view[at : at + data_length])
        require(not any(view[at + data_length : at + round_up(data_length)]), f"{place}: padding of write {write}")
        at += round_up(data_length)
        writes.append(Write(write, kind, volume, where, count, wall_ns, boot_ns, data, flags))
    require(at == length, f"{place}: {length} bytes long, records need {at}")
    require(not any(view[72 + 48 * records : header_length]), f"{place}: padding of the header")
    return Batch(number, first_write, segment.sequence, offset, offset + length, (before, before_end), writes)


def read_mark(path: Path) -> Mark | None:
    """1.4: the valid slot with the higher sequence number."""
    if not path.exists():
        return None
    content = path.read_bytes()
    require(len(content) == 2 * BLOCK, f"{path}: {len(content)} bytes")
    valid = []
    for slot in (content[:BLOCK], content[BLOCK:]):
        magic, version, flags, set_id, *numbers, checksum = struct.unpack_from("<8sII16s8Q", slot)
        if magic == b"PGCDPAPL" and version == 1 and zeroed(slot, 88) == checksum:
            sequence, applied, released, durable, batch, segment, offset = numbers
            valid.append(Mark(bool(flags & 1), set_id, sequence, applied, released, durable, batch, (segment, offset)))
    require(bool(valid), f"{path}: no valid slot")
    return max(valid, key=lambda mark: mark.sequence)


@dataclass(frozen=True)
class Tracked:
    """The bitmap of changed blocks (1.8). `blocks`: of each volume, those that are marked."""

    state: int
    since_ns: int
    behind: int
    begin_ns: int
    blocks: list[set[int]]


def read_tracked(path: Path) -> Tracked:
    """1.8. Raises Wrong for a bad slot or sector."""
    content = path.read_bytes()
    valid = []
    for slot in (content[:BLOCK], content[BLOCK : 2 * BLOCK]):
        magic, version, state, _, sequence, since, behind, begin, volumes, _, checksum = struct.unpack_from(
            "<8sII16sQQQQIIQ", slot
        )
        if magic == b"PGCDPTRK" and version == 1 and zeroed(slot, 72) == checksum:
            valid.append((sequence, state, since, behind, begin, struct.unpack_from(f"<{volumes}Q", slot, 80)))
    require(bool(valid), f"{path}: no valid slot")
    _, state, since, behind, begin, sizes = max(valid)
    blocks: list[set[int]] = []
    page = 2
    for size in sizes:
        marked = set()
        pages = -(-size // 32000)
        for sector in range(page * 8 - 16, (page + pages) * 8 - 16):
            at = 2 * BLOCK + sector * 512
            require(zeroed(content[at : at + 512], 0) == int.from_bytes(content[at : at + 8], "little"), f"{sector}")
            require(int.from_bytes(content[at + 8 : at + 12], "little") == sector, f"{path}: sector {sector}")
            bits = int.from_bytes(content[at + 12 : at + 512], "little")
            first = (sector - (page * 8 - 16)) * 4000
            while bits:
                marked.add(first + (bits & -bits).bit_length() - 1)
                bits &= bits - 1
        page += pages
        blocks.append(marked)
    return Tracked(state, since, behind, begin, blocks)


def read_journal(directory: Path) -> Journal:
    """1.5. Raises Wrong for damage."""
    paths = sorted(p for p in directory.iterdir() if p.suffix == ".seg")
    segments = [read_segment(path) for path in paths]
    mark = read_mark(directory / "applied")
    for a, b in pairwise(segments):
        require(b.sequence == a.sequence + 1, f"a segment is missing between {a.sequence} and {b.sequence}")
    require(len({s.set_id for s in segments} | ({mark.set_id} if mark else set())) <= 1, "segments of several sets")
    batches = list(_chain(segments))
    journal = Journal(segments[0].set_id if segments else None, segments, batches, mark)
    if mark:
        require(journal.last_write >= mark.durable, f"write {mark.durable} was durable, the journal ends before it")
        done = min(mark.applied, mark.released)
        if batches:
            require(batches[0].first_write <= done + 1, f"writes from {done + 1} on are missing")
        else:
            gone = not segments or mark.durable_end[0] < segments[0].sequence
            require(gone and done == mark.durable, f"writes up to {mark.durable} are missing")
    return journal


def _chain(segments: Sequence[Segment]) -> Iterator[Batch]:
    """The batches that belong to the journal, in order (rules 2 to 4)."""
    if not segments:
        return
    firsts = [read_batch(segment, BLOCK) for segment in segments]
    # Rule 2. A first batch that continues what is gone says so: the one before it ended in an earlier segment.
    starts = [i for i, first in enumerate(firsts) if first and first.previous[0] < segments[0].sequence]
    if not starts:
        require(not any(firsts), "the first segment does not begin with a batch, a later one does")
        require(not _valid_from(segments[0], BLOCK, 1), f"{segments[0].path.name} offset {BLOCK}: damaged")
        return
    # Rule 3 lets the later segment win wherever two claim to continue from the same place.
    at = starts[-1]
    batch = firsts[at]
    while batch:
        yield batch
        here = (batch.segment, batch.end)
        expected = (batch.number + 1, batch.last_write + 1, here)
        later = [
            i
            for i in range(at + 1, len(segments))
            if (f := firsts[i]) and (f.number, f.first_write, f.previous) == expected
        ]
        if later:
            at = later[-1]
            batch = firsts[at]
            continue
        following = read_batch(segments[at], batch.end)
        if following and (following.number, following.first_write, following.previous) == expected:
            batch = following
            continue
        # Rule 4.
        place = f"{segments[at].path.name} offset {batch.end}: write {batch.last_write + 1}"
        require(not any(firsts[at + 1 :]), f"{place} is damaged: a later segment goes on")
        require(not _valid_from(segments[at], batch.end, batch.number + 1), f"{place} is damaged: batches follow")
        return


def _valid_from(segment: Segment, offset: int, number: int) -> bool:
    """Whether a valid batch with at least this number lies at `offset` or behind it."""
    for at in range(offset, segment.size, BLOCK):
        if segment.content[at : at + 8] == b"PGCDPBAT":
            batch = read_batch(segment, at)
            if batch and batch.number >= number:
                return True
    return False


def apply(volumes: Sequence[bytearray], write: Write) -> None:
    """Does one write to the bytes of the volumes (1.3)."""
    if write.kind == MARK:
        return
    volume = volumes[write.volume]
    end = write.offset + write.length
    require(end <= len(volume), f"write {write.number} ends at {end}, volume {write.volume} at {len(volume)}")
    volume[write.offset : end] = write.data if write.kind == WRITE else bytes(write.length)


def replay(baseline: Sequence[bytes | bytearray], writes: Iterable[Write], last: int) -> list[bytearray]:
    """The volumes after write `last`, from their bytes before the first of `writes` (or any later state up to `last`,
    because writes say what a range holds, not how it changes)."""
    volumes = [bytearray(volume) for volume in baseline]
    for write in writes:
        if write.number <= last:
            apply(volumes, write)
    return volumes


# ---- 2. Frames


@dataclass(frozen=True)
class Frames:
    """A frames file: its stream, whole."""

    content: str
    set_id: bytes
    interval: int
    stream: bytes
    frames: int


def read_frames(path: Path, *, finished: bool = True) -> Frames:
    """Section 2. An unfinished file ends before the first frame that does not hold. Raises Wrong."""
    raw = path.read_bytes()
    magic, version, content, set_id, interval, reserved, checksum = struct.unpack_from("<8sI4s16sQ16sQ", raw)
    require(magic == b"PGCDPFRM" and version == 1 and not any(reserved), f"{path}: not a frames file")
    require(zeroed(raw[:64], 56) == checksum, f"{path}: header checksum")
    stream = bytearray()
    directory = b""
    at = 64
    while True:
        frame = _read_frame(raw, at, len(stream))
        if frame is None:
            require(not finished, f"{path}: frame at offset {at}")
            return Frames(content.decode(), set_id, interval, bytes(stream), len(directory) // 24)
        codec, data, stored = frame
        if codec == 255 and not finished:  # it was just being finished
            return Frames(content.decode(), set_id, interval, bytes(stream), len(directory) // 24)
        if codec == 255:
            break
        directory += struct.pack("<QQII", len(stream), at, len(data), stored)
        stream += data
        at += 32 + stored
    require(data == directory, f"{path}: directory at offset {at}")
    end = at + 32 + stored
    magic, place, count, checksum = struct.unpack_from("<8sQQQ", raw, end)
    require(magic == b"PGCDPEND" and xxh3(raw[end : end + 24]) == checksum, f"{path}: trailer")
    require((place, count, len(raw)) == (at, len(directory) // 24, end + 32), f"{path}: trailer does not fit")
    return Frames(content.decode(), set_id, interval, bytes(stream), count)


def _read_frame(raw: bytes, at: int, position: int) -> tuple[int, bytes, int] | None:
    """Codec, raw bytes and stored length of the frame at `at`, None when it does not hold."""
    if at + 32 > len(raw):
        return None
    magic, codec, where, raw_length, stored, checksum = struct.unpack_from("<4sIQIIQ", raw, at)
    if magic != b"FRAM" or where != position or at + 32 + stored > len(raw):
        return None
    if zeroed(raw[at : at + 32 + stored], 24) != checksum:
        return None
    data = raw[at + 32 : at + 32 + stored]
    if codec == 1:
        data = zstandard.ZstdDecompressor().decompress(data, max_output_size=max(raw_length, 1))
    require(codec in (0, 1, 255) and len(data) == raw_length, f"frame at offset {at}: {len(data)} bytes")
    return codec, data, stored


# ---- 3. Store


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with its checksum (section 3)."""
    value = json.loads(path.read_bytes())
    assert isinstance(value, dict)
    rest = {key: item for key, item in value.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    require(value.get("checksum") == f"{xxh3(text):016x}", f"{path}: checksum")
    return value


@dataclass(frozen=True)
class Extent:
    block: int
    count: int
    volume: int
    zeros: bool
    source: int
    write: int


@dataclass(frozen=True)
class StoredInterval:
    """An interval of the store (3.1), read whole."""

    number: int
    writes: list[Write]
    backward: bytes
    backward_map: list[Extent]
    data: bytes
    forward_map: list[Extent]
    manifest: dict[str, Any]


def read_map(frames: Frames) -> list[Extent]:
    """3.2: sorted by volume and block, none twice."""
    require(len(frames.stream) % 32 == 0, "map of odd length")
    extents = []
    end = (-1, 0)
    for block, count, volume, kind, source, write in struct.iter_unpack("<QIHHQQ", frames.stream):
        require(kind in (0, 1) and count > 0, f"extent at block {block} of volume {volume}: kind {kind}")
        require((volume, block) >= end, f"extent at block {block} of volume {volume} is out of order")
        end = (volume, block + count)
        extents.append(Extent(block, count, volume, kind == 1, source, write))
    return extents


def read_index(index: Frames, data: bytes) -> list[Write]:
    """The writes of an interval, with their data."""
    require(len(index.stream) % 64 == 0, "index of odd length")
    writes: list[Write] = []
    at = 0
    for entry in struct.iter_unpack("<BBHIQQQQQQQ", index.stream):
        kind, flags, volume, data_length, number, wall_ns, boot_ns, offset, length, position, reserved = entry
        require(flags <= 2 * (kind == MARK) and reserved == 0, f"index of write {number}: reserved")
        require(not writes or number == writes[-1].number + 1, f"index of write {number}: gap")
        require(data_length == 0 or position == at, f"index of write {number}: its data is at {position}, not {at}")
        content = data[at : at + data_length]
        at += data_length
        writes.append(Write(number, kind, volume, offset, length, wall_ns, boot_ns, content))
    require(at == len(data), f"index covers {at} of {len(data)} bytes")
    return writes


def read_interval(directory: Path) -> StoredInterval:
    """3.1. Raises Wrong."""
    number = int(directory.name)
    kinds = {"writes": "WRIT", "index": "INDX", "backward": "BWRD", "backward.map": "BMAP", "forward.map": "FMAP"}
    files = {name: read_frames(directory / name) for name in kinds}
    for name, kind in kinds.items():
        require((files[name].content, files[name].interval) == (kind, number), f"{directory}/{name}: another file's")
    backward_map, forward_map = read_map(files["backward.map"]), read_map(files["forward.map"])
    require(set(_blocks(backward_map)) == set(_blocks(forward_map)), f"{directory}: maps name other blocks")
    data = files["writes"].stream
    return StoredInterval(
        number=number,
        writes=read_index(files["index"], data),
        backward=files["backward"].stream,
        backward_map=backward_map,
        data=data,
        forward_map=forward_map,
        manifest=read_json(directory / "manifest.json"),
    )


def read_open_interval(directory: Path) -> list[Write]:
    """The writes of `incoming/NNNNNNNNNN` of which index and data are there; none when it was just being made."""
    try:
        data, index = (read_frames(directory / name, finished=False) for name in ("writes", "index"))
    except (FileNotFoundError, struct.error, Wrong):
        return []
    stream = index.stream[: len(index.stream) // 64 * 64]
    whole, end = 0, 0
    for data_length, position in struct.iter_unpack("<4xI40xQ8x", stream):
        if data_length and position + data_length > len(data.stream):
            break
        whole, end = whole + 64, position + data_length if data_length else end
    return read_index(replace(index, stream=stream[:whole]), data.stream[:end])


def _blocks(extents: Iterable[Extent]) -> Iterator[tuple[int, int]]:
    for extent in extents:
        for i in range(extent.count):
            yield extent.volume, extent.block + i


def put_extents(volumes: Sequence[bytearray], extents: Iterable[Extent], stream: bytes) -> None:
    """Puts the blocks that a map names into the volumes."""
    for extent in extents:
        length = extent.count * BLOCK
        content = bytes(length) if extent.zeros else stream[extent.source : extent.source + length]
        require(len(content) == length, f"extent at block {extent.block}: its source ends early")
        at = extent.block * BLOCK
        volumes[extent.volume][at : at + length] = content


@dataclass(frozen=True)
class Store:
    root: Path
    volumes: list[str]
    sizes: list[int]
    state: dict[str, Any]
    intervals: dict[int, StoredInterval]

    def image(self) -> list[bytearray]:
        """The backup image as its state says; every block checked against its sum (3.3)."""
        require(self.state["state"] == "at", f"the image is {self.state['state']}")
        return [self._image_of(name, size) for name, size in zip(self.volumes, self.sizes, strict=True)]

    def _image_of(self, name: str, size: int) -> bytearray:
        content = (self.root / "image" / f"{name}.img").read_bytes()
        sums = (self.root / "image" / f"{name}.sums").read_bytes()
        require(len(content) == size and len(sums) == size // BLOCK * 8, f"image {name}: its length")
        zeros = xxh3(bytes(BLOCK))
        for block, (stored,) in enumerate(struct.iter_unpack("<Q", sums)):
            require(
                xxh3(content[block * BLOCK : (block + 1) * BLOCK]) ^ zeros == stored, f"image {name}: block {block}"
            )
        return bytearray(content)

    def image_at_boundary(self, boundary: int) -> list[bytearray]:
        """The image rolled back with backward increments. Raises Wrong when it is not there."""
        volumes = self.image()
        at = int(self.state["boundary"])
        require(boundary <= at, f"boundary {boundary} is later than the image, {at}")
        for number in range(at, boundary, -1):
            put_extents(volumes, self.intervals[number].backward_map, self.intervals[number].backward)
        return volumes

    def at_write(self, write: int) -> list[bytearray]:
        """The volumes after `write`, which lies in one of the intervals: the boundary before it, then each write."""
        for interval in self.intervals.values():
            if interval.writes and interval.writes[0].number <= write <= interval.writes[-1].number:
                return replay(self.image_at_boundary(interval.number - 1), interval.writes, write)
        raise Wrong(f"no interval holds write {write}")


def read_store(root: Path, *, intervals: bool = True) -> Store:
    """Section 3: everything published, or without the intervals. Raises Wrong."""
    described = read_json(root / "store.json")
    volumes = sorted(described["volumes"], key=lambda volume: int(volume["number"]))
    directories = sorted(path for path in (root / "intervals").iterdir() if path.name.isdigit() and intervals)
    return Store(
        root=root,
        volumes=[str(volume["name"]) for volume in volumes],
        sizes=[int(volume["bytes"]) for volume in volumes],
        state=read_json(root / "image" / "state.json"),
        intervals={int(path.name): read_interval(path) for path in directories},
    )
