"""Pure: from a recovery point and what the store holds to a map that says of each block where its bytes are.

A map is an array MAP_EXTENT, sorted by volume and block, without overlaps; what it does not name is the image's. It
is made of layers, of which a later one hides an earlier one. For a write P in interval j, with the image at boundary
k >= j:

    image | backward k | backward k-1 | ... | backward j | writes of j up to P

and for P behind the image: image | forward k+1 | forward k+2 | ... | writes of the last one up to P. An image that is
moving from k to k+1 counts as one at k+1 whose changed blocks nobody knows: both increments of k+1 name all of them,
and one of the two is always the lowest layer, so none is ever read from the image.

Everything works on extents, never on blocks: a discard of the whole volume is one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import BugError, TargetError
from pgcdp.records import BLOCK, EXTENT_DATA, MAP_EXTENT, Interval

_VOLUME_SHIFT = 46

Extents = NDArray[np.void]
"""An array MAP_EXTENT."""
_Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """A layer: all of an interval's backward or forward increment, or its writes from its beginning up to a point."""

    kind: Literal["backward", "forward", "writes"]
    number: int


def plan(
    boundary: int, write: int, moving_to: int | None, intervals: Sequence[Interval], point: int
) -> tuple[list[Step], int]:
    """The layers of `point` (a write number) from the lowest on, and the write up to which they reach.

    The image is at `boundary`, whose write is `write`, or on its way from there to `moving_to`. `intervals` are the
    published ones, in order. The second is `point`, or less when what follows is in no published interval.
    """
    by_number = {interval.number: interval for interval in intervals}
    by_first = {interval.first: interval for interval in intervals}
    if moving_to is not None:
        write = _known(by_number, moving_to).to_write
    if point < write:
        return _back(by_number, moving_to or boundary, point), point
    steps = [Step("forward", moving_to)] if moving_to is not None else []
    first = (moving_to or boundary) + 1
    while write < point and first in by_first:
        interval = by_first[first]
        if interval.to_write > point:
            return [*steps, _writes(interval, point)], point
        steps.append(Step("forward", interval.number))
        first, write = interval.number + 1, interval.to_write
    return steps, write


def _writes(interval: Interval, point: int) -> Step:
    if not interval.restorable_by_write:
        raise TargetError(
            f"write {point} lies in interval {interval.number}, of which only the boundaries are left",
            f"--target-boundary {interval.number} is the nearest behind it",
        )
    return Step("writes", interval.number)


def _back(by_number: dict[int, Interval], number: int, point: int) -> list[Step]:
    steps = []
    while True:
        interval = _known(by_number, number)
        steps.append(Step("backward", number))
        if interval.from_write <= point + 1:
            break
        number = interval.first - 1
    if interval.from_write <= point:
        steps.append(_writes(interval, point))
    return steps


def _known(by_number: dict[int, Interval], number: int) -> Interval:
    if number not in by_number:
        raise TargetError(f"the store has no interval {number}", "pgcdp info lists what exists")
    return by_number[number]


def layer(extents: NDArray[np.void], source: int) -> Extents:
    """An array EXTENT (a forward or backward map) as extents of the source with this number."""
    made = np.zeros(len(extents), dtype=MAP_EXTENT)
    for name in ("block", "count", "volume", "kind"):
        made[name] = extents[name]
    data = extents["kind"] == EXTENT_DATA
    made["position"] = np.where(data, extents["source"], 0)
    made["source"] = np.where(data, source, 0)
    return made


def overlay(top: Extents, bottom: Extents) -> Extents:
    """Both as one map; where both name a block, `top` has it. The extents of `bottom` are split around it."""
    return flatten((bottom, top))


def within(extents: NDArray[np.void], blocks: Sequence[int]) -> NDArray[np.void]:
    """What of an array EXTENT lies on volumes of so many blocks: a set gets more and larger ones with time."""
    limits = np.array(blocks, dtype=np.int64)
    known = extents[extents["volume"] < len(limits)].copy()
    room = limits[known["volume"]] - known["block"].astype(np.int64)
    known["count"] = np.minimum(known["count"].astype(np.int64), np.maximum(room, 0))
    return known[known["count"] > 0]


def moved_on(shown: Extents, backward: NDArray[np.void], source: int) -> Extents:
    """A map under which the image may move over one more interval; its `backward` increment (array EXTENT) is `source`.

    `shown` is a map over the image as it is; of what it leaves to the image, the increment has all that the move
    changes. Doing it twice changes nothing.
    """
    return overlay(shown, layer(backward, source))


def flatten(layers: Sequence[Extents]) -> Extents:
    """One map of all layers, the lowest first; where several name a block, the highest has it.

    Neighbours are joined in pairs, so that many layers cost n log n, and as numbers only: rows are copied once.
    """
    layers = [part for part in layers if len(part)]
    if len(layers) < 2:
        return layers[0] if layers else np.empty(0, dtype=MAP_EXTENT)
    rows = np.concatenate(layers)
    begin, end = _range(rows)
    whole = _Parts(begin, end, np.arange(len(rows)))
    behind = np.cumsum([len(part) for part in layers]).tolist()
    parts = [whole.between(first, last) for first, last in zip([0, *behind], behind, strict=False)]
    while len(parts) > 1:
        joined = [_over(parts[i + 1], parts[i]) for i in range(0, len(parts) - 1, 2)]
        parts = [*joined, *parts[len(joined) * 2 :]]
    (left,) = parts
    found = rows[left.row]
    passed = left.begin - begin[left.row]
    found["block"] += passed.astype(np.uint64)
    found["count"] = left.end - left.begin
    data = found["kind"] == EXTENT_DATA
    found["position"][data] += (passed[data] * BLOCK).astype(np.uint64)
    return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """Parts of rows, sorted and without overlaps: first block and block behind as of `_range`, and of which row."""

    begin: _Ints
    end: _Ints
    row: _Ints

    def between(self, first: int, last: int) -> _Parts:
        return _Parts(self.begin[first:last], self.end[first:last], self.row[first:last])


def _over(top: _Parts, bottom: _Parts) -> _Parts:
    """Both; where both name a block, `top` has it."""
    # The gaps between parts of `top`, of which there is one more than parts.
    gap_begin = np.concatenate([[0], top.end])
    gap_end = np.concatenate([top.begin, [np.iinfo(np.int64).max]])
    first = np.searchsorted(gap_end, bottom.begin, side="right")
    behind = np.searchsorted(gap_begin, bottom.end, side="left")
    pieces = np.maximum(behind - first, 0)
    part = np.repeat(np.arange(len(pieces)), pieces)
    gap = np.arange(len(part)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + first[part]
    kept_begin = np.maximum(bottom.begin[part], gap_begin[gap])
    kept_end = np.minimum(bottom.end[part], gap_end[gap])
    there = kept_begin < kept_end
    begin = np.concatenate([top.begin, kept_begin[there]])
    order = np.argsort(begin, kind="stable")
    end = np.concatenate([top.end, kept_end[there]])
    row = np.concatenate([top.row, bottom.row[part[there]]])
    return _Parts(begin[order], end[order], row[order])


def check(extents: Extents, blocks: Sequence[int]) -> None:
    """That a map is what the engine takes; `blocks` are those of each volume. BugError when it is not."""
    begin, end = _range(extents)
    limits = np.array(blocks, dtype=np.int64)
    volume = extents["volume"].astype(np.int64)
    if np.any(begin[1:] < end[:-1]) or np.any(begin >= end):
        raise BugError("the extents of a map overlap or are not in order")
    if np.any(volume >= len(limits)) or np.any(end - (volume << _VOLUME_SHIFT) > limits[volume]):
        raise BugError("an extent of a map lies outside of its volume")


def _range(extents: Extents) -> tuple[_Ints, _Ints]:
    """First block and block behind, of all volumes in one order."""
    begin = (extents["volume"].astype(np.int64) << _VOLUME_SHIFT) + extents["block"].astype(np.int64)
    return begin, begin + extents["count"].astype(np.int64)
