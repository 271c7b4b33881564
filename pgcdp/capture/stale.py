"""Whether a volume holds what its journal says, where a set was not stopped in order; before anything is written to it.

Its disk may be an older copy of itself: a snapshot put back, a mirror half that fell behind, an image file from a
backup. The filesystem on it has the right UUID, and a replay of the journal behind the applied mark would make a volume
of it that never was. Or it is the right disk, and has lost writes that it had said were durable.

All writes up to the applied mark were synced to the volumes. So a block whose last write in the journal is one of these
must be on its volume exactly so. What was written behind the mark may have been applied, or half so, or not: nothing is
asked of such a block, nor of one that was tracked past the journal. The newest blocks count first, as the likeliest to
be missing; how many are compared is bounded, since whatever waits for the volume waits for this.

What is not found by this: a copy that lacks nothing of what the journal still has in front of the mark.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from pgcdp import log
from pgcdp.capture import backings, same_parts, tracked
from pgcdp.capture.journal import Journal
from pgcdp.capture.segment import SEGMENT_HEADER_BYTES, Segment
from pgcdp.capture.superblock import Read, reading
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.records import BLOCK, RECORD, Kind

BLOCKS = 32768
"""So many are compared, of all volumes together."""
SECONDS = 2.0
"""How long the journal is read for it, from the segment that the applied mark is in back, and then the volumes."""
SECONDS_BEHIND = 10.0
"""How long what lies behind the applied mark may take to be read; where it takes longer nothing is compared."""
_STEP = 2048
"""So many of the newest blocks are read in order of their places, then the next ones."""
_NEAR, _RUN = 8, 256
"""Blocks between two that are read with them; blocks read at once."""
_OF_ZEROS = 64
"""So many blocks are compared of what one zero or discard has left."""
_LARGE = 1 << 18
"""Blocks of a zero or discard that is kept as a range."""

_log = log.get(__name__)


class Expected(NamedTuple):
    """What a block must hold: the XXH3-64 of its bytes."""

    volume: int
    block: int
    checksum: int


@dataclass(slots=True)
class Compared:
    """Of one volume: blocks that were compared, and how many of them differ."""

    blocks: int = 0
    differ: int = 0


class _Late(Exception):
    """There is no more time."""


def refuse_stale(config: Config) -> None:
    """Raises PreconditionError when a volume is not what it was when the set stopped, otherwise than in order.

    Nobody captures. What cannot be read is left to the engine to tell of, and so is a
    journal that is damaged.
    """
    if config.paths.extend_state.exists():  # its new volume may have taken the number of one that was put back
        return
    begun = time.monotonic()
    try:
        found = _compared(config, begun)
    except (DamageError, OSError, _Late) as error:
        _log.info("the volumes of %s are not compared with the journal: %r", config.name, error)
        return
    if not found:
        return
    told = ", ".join(f"{volume.name} {each.blocks}" for volume, each in zip(config.volumes, found, strict=True))
    _log.info("blocks of %s compared with the journal, in %.2f s: %s", config.name, time.monotonic() - begun, told)
    wrong = [(volume, each) for volume, each in zip(config.volumes, found, strict=True) if each.differ]
    if wrong:
        raise _error(config, wrong)


def _error(config: Config, wrong: Sequence[tuple[VolumeConfig, Compared]]) -> PreconditionError:
    told = "; ".join(
        f"volume {volume.name} of {config.name} on {volume.backing} is not what it was: {each.differ} of {each.blocks} "
        "blocks that were compared do not hold what the journal has of them"
        for volume, each in wrong
    )
    return PreconditionError(
        f"{told}. Either it is an older copy of the volume, or a disk, its own or the journal's, has lost writes that "
        "it had told were durable. The replay of the journal would make of it what never was; nothing was changed",
        f"which disk is the right one? If it is another, put that one in its place; {_way_on(config, wrong)}",
    )


def _way_on(config: Config, wrong: Sequence[tuple[VolumeConfig, Compared]]) -> str:
    """What is typed where there is no better disk."""
    paths, name = config.paths, config.name
    if any(each.exists() for each in (paths.heal_state, paths.rewind_state)):  # what is to be finished needs it
        return f"if there is none: pgcdp restore {name} --to-directory DIR"
    if (gap := tracked.unrecorded_gap(Journal(config.journal, config.set_id_bytes))) is not None:
        return (
            f"what was changed behind write {gap.begin - 1} is on the volumes alone. If there is none: pgcdp "
            f"restore {name} --to-directory DIR"
        )
    aside = [f"mv {each.backing} {each.backing}.old" for each, _ in wrong if not each.device]
    first = f"{', '.join(aside)}, and then " if aside else ""
    return f"if there is none: {first}{backings.remakes(config, *(each for each, _ in wrong))}"


def _compared(config: Config, begun: float) -> list[Compared]:
    """Of each volume; of none where there is nothing to compare with. Raises DamageError, OSError, _Late."""
    journal = Journal(config.journal, config.set_id_bytes)
    mark, since = journal.applied_mark(), same_parts.taken_at(config)
    if mark is None or mark.clean or since is None:
        return []
    marked = tracked.marked_blocks(journal)
    if marked is None:
        return []
    written = _Written([volume.bytes // BLOCK for volume in config.volumes])
    written.add_tracked(marked)
    for run in journal.batches(mark.applied_write, None):
        if time.monotonic() > begun + SECONDS_BEHIND:
            raise _Late(f"the journal has much behind write {mark.applied_write}")
        for record in run.records[["kind", "volume", "offset", "length"]].tolist():
            written.add(*record)
    wanted = _wanted(journal, (since, mark.applied_write), written, time.monotonic() + SECONDS)
    until = time.monotonic() + SECONDS
    found = [Compared() for _ in config.volumes]
    with suppress(_Late):
        for at in range(0, len(wanted), _STEP):
            _compare(config, sorted(wanted[at : at + _STEP]), found, until)
    return found


# --- what the journal has


class _Written:
    """Blocks of which it is known what they hold last, or that it cannot be known; of each volume."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._blocks = [np.zeros(blocks, dtype=np.bool_) for blocks in sizes]
        self._ranges: list[list[tuple[int, int]]] = [[] for _ in sizes]

    def add_tracked(self, blocks: Sequence[NDArray[np.bool_]]) -> None:
        """What a bitmap says. Volumes that only one of both has are left out."""
        for mine, theirs in zip(self._blocks, blocks, strict=False):
            count = min(len(mine), len(theirs))
            mine[:count] |= theirs[:count]

    def add(self, kind: int, volume: int, offset: int, length: int) -> NDArray[np.int64]:
        """What a record writes is in it; the blocks that were not before, counted from the record's first one."""
        first, end = offset // BLOCK, (offset + length) // BLOCK
        nothing = np.empty(0, dtype=np.int64)
        if kind not in (Kind.WRITE, Kind.ZERO, Kind.DISCARD) or volume >= len(self._blocks):
            return nothing
        part = self._blocks[volume][first:end]
        if len(part) < end - first:  # of a volume that is larger than the settings say: the engine tells
            return nothing
        fresh = ~part
        for begin, over in self._ranges[volume]:
            fresh[max(begin - first, 0) : max(over - first, 0)] = False
        if end - first >= _LARGE:  # so that not all of a large volume's map is memory
            self._ranges[volume].append((first, end))
        else:
            part[:] = True
        return np.flatnonzero(fresh)


class _Batch(NamedTuple):
    """The records of one, and the checksums of the blocks of its data."""

    records: NDArray[np.void]
    checksums: list[int]


_ZEROS = xxhash.xxh3_64_intdigest(bytes(BLOCK))


def _wanted(journal: Journal, writes: tuple[int, int], written: _Written, until: float) -> list[Expected]:
    """What blocks must hold by the writes behind the first and up to the second of `writes`, the newest first."""
    since, upto = writes
    found: list[Expected] = []
    for batches in _segments_back(journal, since, upto):
        for batch in reversed(batches):
            for each in _of_batch(batch, writes, written):
                found.append(each)
                if len(found) >= BLOCKS:
                    return found
        if time.monotonic() > until:
            break
    return found


def _segments_back(journal: Journal, since: int, upto: int) -> Iterator[list[_Batch]]:
    """The batches up to write `upto`, of a segment at a time, the newest one first.

    It ends where some are missing or not what was written: what is older may be overwritten by them. Segments that were
    passed over have numbers that a later one has as well.
    """
    for sequence in reversed(journal.segments()):
        if upto <= since:
            return
        with suppress(FileNotFoundError):
            batches: list[_Batch] = []
            segment = Segment(journal.path(sequence), sequence, journal.set_id, journal.window)
            try:
                first, last = _read(segment, upto, batches)
            finally:
                segment.close()
            if first is None or first > upto:
                continue
            if last < upto:
                return
            yield batches
            upto = first - 1


def _read(segment: Segment, upto: int, batches: list[_Batch]) -> tuple[int | None, int]:
    """Batches from a segment's first to the one that has write `upto`; the first write that was found, and the last."""
    place, first, last = SEGMENT_HEADER_BYTES, None, 0
    while last < upto and (head := segment.batch(place)) is not None:
        if first is None:
            first = head.first
        elif head.first != last + 1:
            break
        if head.first > upto:
            break
        batches.append(_batch(*segment.parts(place, head)))
        last = head.last
        place += head.length
    return first, last


def _batch(records: memoryview, data: memoryview) -> _Batch:
    """It keeps neither: the segment's window may be another one for the next batch."""
    checksums = [xxhash.xxh3_64_intdigest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
    return _Batch(np.frombuffer(bytes(records), dtype=RECORD), checksums)


def _of_batch(batch: _Batch, writes: tuple[int, int], written: _Written) -> Iterator[Expected]:
    """Its blocks, those of its last record first, that nothing newer has written."""
    since, upto = writes
    sizes = -(-batch.records["data_length"].astype(np.int64) // BLOCK)
    begins = (np.cumsum(sizes) - sizes).tolist()
    rows = batch.records[["kind", "volume", "offset", "length", "number"]].tolist()
    for begin, (kind, volume, offset, length, number) in zip(reversed(begins), reversed(rows), strict=True):
        if not since < number <= upto:
            continue
        fresh = written.add(kind, volume, offset, length).tolist()
        for at in fresh if kind == Kind.WRITE else fresh[:_OF_ZEROS]:
            checksum = batch.checksums[begin + at] if kind == Kind.WRITE else _ZEROS
            yield Expected(volume, offset // BLOCK + at, checksum)


# --- what the volumes have


def _compare(config: Config, wanted: list[Expected], found: list[Compared], until: float) -> None:
    """Read these, which are in order, past any cache, and count. Raises _Late."""
    for number, volume in enumerate(config.volumes):
        mine = [each for each in wanted if each.volume == number]
        if mine:
            with suppress(OSError), reading(volume.backing) as read:
                for run in _runs(mine):
                    if time.monotonic() > until:
                        raise _Late("the volumes are slow")
                    with suppress(OSError):
                        _compare_run(read, run, found[number])


def _runs(wanted: list[Expected]) -> Iterator[list[Expected]]:
    """Neighbours, in pieces that are read at once."""
    run: list[Expected] = []
    for each in wanted:
        if run and (each.block - run[-1].block > _NEAR or each.block - run[0].block >= _RUN):
            yield run
            run = []
        run.append(each)
    if run:
        yield run


def _compare_run(read: Read, run: list[Expected], found: Compared) -> None:
    first = run[0].block
    data = memoryview(read(first * BLOCK, (run[-1].block + 1 - first) * BLOCK))
    for each in run:
        at = (each.block - first) * BLOCK
        found.blocks += 1
        found.differ += xxhash.xxh3_64_intdigest(data[at : at + BLOCK]) != each.checksum
