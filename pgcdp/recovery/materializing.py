"""A recovery point written out block by block: the image, rolled back by increments, then forward by writes.

What is damaged and hidden by what comes later is not needed: a block of the image that an increment has, an old content
that a write has replaced. It is left out, and remembered until something is written there. What is then still lacking
is damage, and nothing was restored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

from pgcdp.errors import DamageError
from pgcdp.intervals.applying import BlockTarget, apply_backward, apply_forward, apply_run, apply_writes
from pgcdp.intervals.extents import spans
from pgcdp.postgres.wal import blank_wal
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import BLOCK, RecoveryPoint, Volume
from pgcdp.recovery.source import Source
from pgcdp.recovery.writes import from_write
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import Image


class Lacking:
    """A target that knows which of its blocks nobody could read so far.

    `lost` are runs (volume, first block, block behind, damage). What is of volumes `left_out`, by number, goes nowhere.
    """

    def __init__(self, target: BlockTarget, left_out: Collection[int] = ()) -> None:
        self._target = target
        self._left_out = left_out
        self.lost: list[tuple[int, int, int, DamageError]] = []

    def lose(self, volume: int, block: int, count: int, damage: DamageError) -> None:
        """The content of some blocks cannot be read."""
        if volume not in self._left_out:
            self._cover(volume, block, count)
            self.lost.append((volume, block, block + count, damage))

    def write_blocks(self, volume: int, block: int, data: bytes) -> None:
        """As `BlockTarget`."""
        if volume not in self._left_out:
            self._target.write_blocks(volume, block, data)
            self._cover(volume, block, len(data) // BLOCK)

    def zero_blocks(self, volume: int, block: int, count: int) -> None:
        """As `BlockTarget`."""
        if volume not in self._left_out:
            self._target.zero_blocks(volume, block, count)
            self._cover(volume, block, count)

    def _cover(self, volume: int, block: int, count: int) -> None:
        if not self.lost:
            return
        end, left = block + count, []
        for run in self.lost:
            of, first, behind, damage = run
            if of != volume or behind <= block or end <= first:
                left.append(run)
                continue
            if first < block:
                left.append((of, first, block, damage))
            if end < behind:
                left.append((of, end, behind, damage))
        self.lost = left

    def refuse_lost(self) -> None:
        """Raises the first damage that nothing has covered."""
        for _, _, _, damage in self.lost:
            raise damage


def materialize(
    source: Source,
    point: RecoveryPoint,
    target: BlockTarget,
    progress: Report = silent,
    left_out: Collection[int] = (),
) -> None:
    """Write the state at `point` to `target`, whose blocks are zeros. Call it while the source is `held`.

    Volumes `left_out`, by number, are passed over. Every byte is checked on its way. Raises DamageError naming file and
    offset of something that the point needs.
    """
    source.image_state()
    lacking = Lacking(target, left_out)
    image = Image.open(source.store, cut_short=True)
    try:
        before = point.write if point.blank_write is None else point.blank_write - 1
        wanted = [each for each in source.store.volumes if each.number not in left_out]
        done = _copy_image(source, image, wanted, before, lacking, progress)
    finally:
        image.close()
    while done < point.write:
        progress(Progress("applying single writes", done, point.write, "writes"))
        done = source.again(partial(_forward_once, source, done, point.write, lacking))
    if point.blank_write is not None:
        assert point.lsn is not None
        assert point.blank_at is not None
        entry = source.record(point.blank_write)
        data = blank_wal(source.data(point.blank_write), point.blank_at, point.lsn)
        lacking.write_blocks(int(entry["volume"]), int(entry["offset"]) // BLOCK, data)
    lacking.refuse_lost()


def _copy_image(
    source: Source, image: Image, wanted: Sequence[Volume], upto: int, target: Lacking, progress: Report
) -> int:
    """The image of these volumes, rolled back to the last boundary at or before `upto`; returns the write it is at."""
    state = image.state
    moving = source.opened(state.to) if state.to is not None else None
    total = sum(volume.bytes for volume in wanted)
    copied = 0
    for volume in wanted:
        for first, count in _judged(moving, volume.number, volume.bytes // BLOCK):
            for block, size, data in image.contents(volume.number, first, count, target.lose):
                if data is not None:
                    target.write_blocks(volume.number, block, data)
                copied += size * BLOCK
                progress(Progress("copying the image", copied, total))
    number, write = state.boundary, state.write
    if moving is not None:
        apply_forward(target, moving, target.lose)
        number, write = moving.number, moving.interval.to_write
    while write > upto:
        progress(Progress(f"rolling back interval {number}"))
        bundle = source.opened(number)
        apply_backward(target, bundle, target.lose)
        number, write = bundle.interval.first - 1, bundle.interval.from_write - 1
    return write


def _forward_once(source: Source, done: int, upto: int, target: Lacking) -> int:
    """Go on from write `done` with whatever holds the next write; returns the write reached."""
    bundle = source.bundle(done + 1)
    if bundle is not None:
        if done + 1 == bundle.interval.from_write and upto >= bundle.interval.to_write:
            apply_forward(target, bundle, target.lose)
        else:
            with bundle.writes() as writes:
                apply_writes(target, from_write(bundle.index(), done + 1), writes, upto, target.lose)
        return min(upto, bundle.interval.to_write)
    opened = source.snapshot(done + 1)
    if opened is not None:
        with opened.writes as writes:
            apply_writes(target, opened.index, writes, upto)
        return min(upto, int(opened.index["number"][-1]))
    for run in source.batches(done, upto):
        apply_run(target, run)
        done = run.last_write
    return done


def _judged(moving: Bundle | None, volume: int, blocks: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the image's blocks that are what their sums say: all but those of a move in progress."""
    at = 0
    if moving is not None:
        for number, block, count in spans(moving.forward_map()):
            if number == volume:
                if block > at:
                    yield at, block - at
                at = block + count
    if at < blocks:
        yield at, blocks - at
