"""Compare the volumes of a set with a recovery point, and bring one to the other through the capture layer.

A rewind in place writes the point back to the volumes: only blocks that differ.

What can differ from the point lies in two maps: that of the point and that of the newest write, which is what the
volumes hold; in every other block both are the image's. So the work grows with what was changed in between, not with
the volume. Killed anywhere, writing back begins anew, with what it wrote among what was changed.

Healing goes the other way: the volumes are right, and what was captured of them is not. All of their blocks are
compared, and those that differ are written to the volumes again as they are there, so that they are captured.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.volumes import discard
from pgcdp.errors import PreconditionError
from pgcdp.intervals.applying import run_index
from pgcdp.intervals.extents import forward_map, spans
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import BLOCK, EXTENT_DATA, EXTENT_ZEROS, RecoveryPoint
from pgcdp.recovery import blockmap
from pgcdp.recovery.places import place_below
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import make_map, shown
from pgcdp.store.bundle import Bundle

PIECE_BLOCKS = 256
GAP_BLOCKS = 16
"""Blocks that cannot differ, but are read with their neighbours."""
AT_A_TIME = 16
AHEAD = 4096
"""Pieces that are planned at once."""
ZERO_BLOCKS = 16
"""Zeros of at least so many blocks are discarded, which is journalled without data."""


def may_differ(source: Source, point: RecoveryPoint, place: Path) -> NDArray[np.void]:
    """The blocks in which a point can differ from what the volumes hold now: an array MAP_EXTENT.

    Of the set's volumes only, and without those that came behind the point. The kind is zeros where the point has
    them. Call it `held`; `place` is an empty directory, which gets what it needs.
    """
    now = source.again(lambda: _changed(source))
    extents = blockmap.flatten([now, make_map(source, point, place).extents])
    # A volume that was put back is in the store and in none of production's devices.
    extents = blockmap.within(extents, [volume.bytes // BLOCK for volume in source.store.in_use])
    # One that came later was zeros then. It stays as it is, since it could not be mounted.
    later = [each.number for each in source.store.volumes if source.store.since.get(each.name, 0) > point.write]
    return extents[~np.isin(extents["volume"], later)]


def _changed(source: Source) -> NDArray[np.void]:
    """The blocks in which the newest write's state can differ from the image; sources and kinds mean nothing."""
    state, upto = source.image_state(), source.newest()
    steps, reached = blockmap.plan(state.boundary, state.write, state.to, source.intervals(), upto)
    layers = []
    for step in steps:  # the newest is in no interval's midst: no step is a part of one's writes
        bundle = Bundle.open(source.store, step.number)
        layers.append(bundle.backward_map() if step.kind == "backward" else bundle.forward_map())
    if reached < upto:
        layers.append(forward_map(np.concatenate(list(_tail(source, reached, upto)))))
    found = blockmap.flatten([blockmap.layer(layer, 0) for layer in layers])
    found["kind"] = EXTENT_DATA  # zeros now: what is written there may be data
    return found


def _tail(source: Source, done: int, upto: int) -> Iterator[NDArray[np.void]]:
    """Arrays INDEX of the writes behind `done`, which are in no published interval."""
    opened = source.snapshot(done + 1)
    if opened is not None:
        opened.writes.close()
        yield opened.index[opened.index["number"] <= upto]
        done = int(opened.index["number"][-1])
    for run in source.batches(done, upto) if done < upto else ():
        yield run_index(run)


def most_bytes(source: Source, point: RecoveryPoint, below: Path) -> int:
    """How many bytes a rewind to `point` writes at most."""
    with place_below(below) as place, source.held():
        extents = may_differ(source, point, place)
    return int(extents["count"][extents["kind"] != EXTENT_ZEROS].sum()) * BLOCK


def check_devices(source: Source, devices: Sequence[Path]) -> None:
    """Raises PreconditionError unless there is one device for each volume of the set.

    To be asked before the begin record: behind it, production does not come up before all is written back.
    """
    wanted = source.store.in_use
    if wanted != source.store.volumes[: len(devices)] or len(wanted) != len(devices):
        raise PreconditionError(
            f"the store has the volumes {', '.join(each.name for each in wanted)}, the set has {len(devices)} devices",
            "pgcdp status lists the set's volumes; the store is perhaps not that of these",
        )


EXCLUSIVE = os.O_RDWR | os.O_DIRECT | os.O_EXCL
"""A block device is opened by nobody else so, nor mounted anywhere meanwhile."""


def write_back(
    source: Source, point: RecoveryPoint, devices: Sequence[Path], below: Path, progress: Report = silent
) -> int:
    """Make the volumes at `devices` (as `check_devices` wants them, not mounted) what they were at `point`, durably.

    Nobody else writes to them; `source` reaches to the newest write. Scratch files lie below `below`. Returns the bytes
    that were written. Raises DamageError when a byte of the point is not what was stored: they are half-way then.
    """
    with ExitStack() as stack:
        place = stack.enter_context(place_below(below))
        stack.enter_context(source.held())
        (place / "maps").mkdir(mode=0o700)
        extents = may_differ(source, point, place / "maps")
        (place / "view").mkdir(mode=0o700)
        files = stack.enter_context(shown(source, point, place / "view", progress))[: len(devices)]
        pairs = []
        for device, file in zip(devices, files, strict=True):
            pairs.append((_opened(stack, device, EXCLUSIVE), _opened(stack, file, os.O_RDONLY)))
        written = _bring_all(pairs, pieces(spans(extents)), Way.TO_POINT, progress)
        for device_fd, _ in pairs:
            os.fsync(device_fd)
    return sum(written)


class Way(Enum):
    """What becomes of blocks that differ: the device gets what the point has; what the device has is written to it
    once more; or nothing, they are counted."""

    TO_POINT = "writing back what differs"
    TO_CAPTURE = "taking in what differs"
    NONE = "comparing"


def compare(
    source: Source, point: RecoveryPoint, devices: Sequence[Path], way: Way, below: Path, progress: Report = silent
) -> list[int]:
    """Compare all of the volumes at `devices` (as `check_devices` wants them) with a point; bytes that differ, of each.

    Zeros count, unless they are written. Nobody else opens the devices meanwhile. Scratch files lie below `below`.
    Raises DamageError when a byte of the point is not what was stored.
    """
    with ExitStack() as stack:
        place = stack.enter_context(place_below(below))
        files = stack.enter_context(shown(source, point, place, progress))[: len(devices)]
        pairs = []
        for device, file in zip(devices, files, strict=True):
            flags = os.O_DIRECT | (os.O_EXCL if stat.S_ISBLK(device.stat().st_mode) else 0)
            flags |= os.O_RDONLY if way == Way.NONE else os.O_RDWR
            pairs.append((_opened(stack, device, flags), _opened(stack, file, os.O_RDONLY)))
        # Where `grow` was killed, only one of both may be larger: behind the end of the other there are zeros.
        sizes = [os.lseek(device_fd, 0, os.SEEK_END) for device_fd, _ in pairs]
        everything = [
            (each.number, 0, min(each.bytes, size) // BLOCK)
            for each, size in zip(source.store.in_use, sizes, strict=True)
        ]
        found = _bring_all(pairs, pieces(everything), way, progress)
        if way != Way.NONE:
            for device_fd, _ in pairs:
                os.fsync(device_fd)
    return found


def pieces(found: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Spans (volume, first block, blocks) as pieces that are read at once: near ones together, long ones in parts."""
    made: list[tuple[int, int, int]] = []
    for volume, first, count in found:
        if made:
            last_volume, begin, size = made[-1]
            if volume == last_volume and first - (begin + size) <= GAP_BLOCKS and first + count - begin <= PIECE_BLOCKS:
                made[-1] = volume, begin, first + count - begin
                continue
        made += [
            (volume, block, min(PIECE_BLOCKS, first + count - block))
            for block in range(first, first + count, PIECE_BLOCKS)
        ]
    return made


def _bring_all(
    pairs: Sequence[tuple[int, int]], todo: list[tuple[int, int, int]], way: Way, progress: Report
) -> list[int]:
    """All pieces, several at a time: each write waits for a sync of the journal, and one sync can serve many.

    The bytes of each volume that were written, or that differ.
    """
    total, done, written = sum(count for _, _, count in todo) * BLOCK, 0, [0] * len(pairs)
    with ExitStack() as stack:
        memory: SimpleQueue[tuple[mmap.mmap, mmap.mmap]] = SimpleQueue()
        for _ in range(AT_A_TIME):
            ours, theirs = (stack.enter_context(mmap.mmap(-1, PIECE_BLOCKS * BLOCK)) for _ in range(2))
            memory.put((ours, theirs))

        def bring(piece: tuple[int, int, int]) -> tuple[int, int, int]:
            volume, block, count = piece
            buffers = memory.get()
            try:
                return volume, count * BLOCK, _bring(*pairs[volume], *buffers, way, block, count)
            finally:
                memory.put(buffers)

        pool = stack.enter_context(ThreadPoolExecutor(AT_A_TIME))
        stack.callback(pool.shutdown, cancel_futures=True)
        for at in range(0, len(todo), AHEAD):
            for volume, length, bytes_written in pool.map(bring, todo[at : at + AHEAD]):
                done += length
                written[volume] += bytes_written
                progress(Progress(way.value, done, total))
    return written


def _opened(stack: ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _bring(device: int, view: int, ours: mmap.mmap, theirs: mmap.mmap, way: Way, block: int, count: int) -> int:
    """Compare `count` blocks of a device with what a view shows there, and go that way.

    Returns the bytes that were written, or that differ.
    """
    length, at = count * BLOCK, block * BLOCK
    with memoryview(ours) as our_bytes, memoryview(theirs) as their_bytes:
        for fd, memory in ((device, our_bytes), (view, their_bytes)):
            if os.preadv(fd, [memory[:length]], at) != length:
                raise OSError(f"{length} bytes at {at} cannot be read whole")
        written, todo = _compared(our_bytes[:length], their_bytes[:length], way, count)
        for begin, end, zeros in todo:
            if zeros:
                discard(device, at + begin * BLOCK, (end - begin) * BLOCK)
                continue
            # Let go of also when it fails: the error keeps what this frame has, and the memory could not be given back.
            with (their_bytes if way == Way.TO_POINT else our_bytes)[begin * BLOCK : end * BLOCK] as piece:
                if os.pwrite(device, piece, at + begin * BLOCK) != len(piece):
                    raise OSError(f"{len(piece)} bytes at {at + begin * BLOCK} cannot be written whole")
                written += len(piece)
    return written


def _compared(ours: memoryview, theirs: memoryview, way: Way, count: int) -> tuple[int, list[tuple[int, int, bool]]]:
    """Of `count` blocks here and there: the bytes that differ, where only they are wanted; else what is to be written,
    as `_runs`."""
    with ours, theirs:
        now = np.frombuffer(ours, dtype=np.uint64).reshape(count, -1)
        there = np.frombuffer(theirs, dtype=np.uint64).reshape(count, -1)
        differs = np.any(now != there, axis=1)
        empty = np.logical_not(np.any(there if way == Way.TO_POINT else now, axis=1))
        del now, there
    if way == Way.NONE:
        return int(differs.sum()) * BLOCK, []
    return 0, _runs(differs, empty)


def _runs(differs: NDArray[np.bool_], empty: NDArray[np.bool_]) -> list[tuple[int, int, bool]]:
    """(begin, end, whether it is all zeros) of the runs of blocks to be written; short runs of zeros are data."""
    kind = np.where(differs, np.where(empty, 2, 1), 0)
    starts = np.flatnonzero(np.append(True, kind[1:] != kind[:-1]))
    ends = np.append(starts[1:], len(kind))
    found: list[tuple[int, int, bool]] = []
    for begin, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if not kind[begin]:
            continue
        zeros = bool(kind[begin] == 2) and end - begin >= ZERO_BLOCKS
        if found and not zeros and not found[-1][2] and found[-1][1] == begin:
            found[-1] = (found[-1][0], end, False)
        else:
            found.append((begin, end, zeros))
    return found
