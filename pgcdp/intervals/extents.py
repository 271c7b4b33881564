"""Pure: from the write index to the extents that it changed, last writer first (FORMAT.md 3.2).

Blocks of writes are expanded (a GiB of writes is 262,144 of them); zeros and discards stay ranges whatever their
length, since one fstrim may discard the whole volume.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pgcdp.records import BLOCK, EXTENT, EXTENT_DATA, EXTENT_ZEROS, Kind

_VOLUME_SHIFT = 46
_BLOCK_MASK = (1 << _VOLUME_SHIFT) - 1
_EXPAND_AT_ONCE = 4 * 1024 * 1024
_MAX_COUNT = 1 << 31

_Ints = NDArray[np.int64]


def forward_map(index: NDArray[np.void]) -> NDArray[np.void]:
    """Array EXTENT of what the writes of `index` (array INDEX, in order) leave behind, sorted by volume and block.

    source = position in the `writes` stream, write = the last write of the extent's blocks; extents do not overlap.
    """
    rows = index[index["length"] > 0]
    kind = rows["kind"]
    data_rows = rows[kind == Kind.WRITE]
    zero_rows = rows[(kind == Kind.ZERO) | (kind == Kind.DISCARD)]
    keys, numbers, sources = _last_data(data_rows)
    if not len(zero_rows):
        return _data_extents(keys, numbers, sources)
    begins, ends, painted = _paint(zero_rows)
    at = np.searchsorted(begins, keys, side="right") - 1
    inside = (at >= 0) & (keys < ends[at])
    alive = ~inside | (numbers > painted[at])
    keys, numbers, sources, inside = keys[alive], numbers[alive], sources[alive], inside[alive]
    zeros = _zero_extents(begins, ends, painted, keys[inside])
    both = np.concatenate([_data_extents(keys, numbers, sources), zeros])
    return both[np.argsort(_keys(both), kind="stable")]


def spans(extents: NDArray[np.void]) -> list[tuple[int, int, int]]:
    """(volume, first block, blocks) of a sorted map's blocks, adjacent extents joined."""
    if not len(extents):
        return []
    begin = _keys(extents)
    end = begin + extents["count"].astype(np.int64)
    starts = np.flatnonzero(np.append(True, begin[1:] != end[:-1]))
    stops = np.append(starts[1:], len(extents)) - 1
    first = begin[starts]
    counts = end[stops] - first
    return list(zip((first >> _VOLUME_SHIFT).tolist(), (first & _BLOCK_MASK).tolist(), counts.tolist(), strict=True))


def _keys(rows: NDArray[np.void]) -> _Ints:
    return (rows["volume"].astype(np.int64) << _VOLUME_SHIFT) + rows["block"].astype(np.int64)


def _last_data(rows: NDArray[np.void]) -> tuple[_Ints, _Ints, _Ints]:
    """For each block that a write touched: key, number of its last write, source; sorted by key."""
    keys = numbers = sources = np.empty(0, dtype=np.int64)
    counts = (rows["length"] // BLOCK).astype(np.int64)
    totals = np.cumsum(counts)
    begin = 0
    while begin < len(rows):
        done = int(totals[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, done + _EXPAND_AT_ONCE, side="right")))
        part, size = rows[begin:end], counts[begin:end]
        row = np.repeat(np.arange(len(part)), size)
        within = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
        first = (part["volume"].astype(np.int64) << _VOLUME_SHIFT) + (part["offset"] // BLOCK).astype(np.int64)
        keys = np.concatenate([keys, first[row] + within])
        numbers = np.concatenate([numbers, part["number"].astype(np.int64)[row]])
        sources = np.concatenate([sources, part["position"].astype(np.int64)[row] + within * BLOCK])
        order = np.argsort(keys, kind="stable")
        pick = order[np.append(keys[order][1:] != keys[order][:-1], True)]
        keys, numbers, sources = keys[pick], numbers[pick], sources[pick]
        begin = end
    return keys, numbers, sources


def _data_extents(keys: _Ints, numbers: _Ints, sources: _Ints) -> NDArray[np.void]:
    """Join blocks that follow each other on the volume, in the stream, and come from one write."""
    if not len(keys):
        return np.empty(0, dtype=EXTENT)
    joined = (np.diff(keys) == 1) & (np.diff(sources) == BLOCK) & (np.diff(numbers) == 0)
    starts = np.flatnonzero(np.append(True, ~joined))
    counts = np.diff(np.append(starts, len(keys)))
    return _extents(keys[starts], counts, EXTENT_DATA, sources[starts], numbers[starts])


def _extents(keys: _Ints, counts: _Ints, kind: int, sources: _Ints | int, numbers: _Ints) -> NDArray[np.void]:
    made = np.zeros(len(keys), dtype=EXTENT)
    made["block"], made["volume"] = keys & _BLOCK_MASK, keys >> _VOLUME_SHIFT
    made["count"], made["kind"], made["source"], made["write"] = counts, kind, sources, numbers
    return made


def _paint(rows: NDArray[np.void]) -> tuple[_Ints, _Ints, _Ints]:
    """Disjoint sorted ranges [begin, end) of keys with the number of the last zero or discard over each."""
    first = (rows["volume"].astype(np.int64) << _VOLUME_SHIFT) + (rows["offset"] // BLOCK).astype(np.int64)
    behind = first + (rows["length"] // BLOCK).astype(np.int64)
    points = np.unique(np.concatenate([first, behind]))
    painted = np.zeros(len(points), dtype=np.int64)
    begin, end = np.searchsorted(points, first), np.searchsorted(points, behind)
    for a, b, number in zip(begin.tolist(), end.tolist(), rows["number"].tolist(), strict=True):
        painted[a:b] = number
    begins, ends, painted = points[:-1], points[1:], painted[:-1]
    used = painted > 0
    begins, ends, painted = begins[used], ends[used], painted[used]
    joined = (begins[1:] == ends[:-1]) & (painted[1:] == painted[:-1])
    starts = np.flatnonzero(np.append(True, ~joined))
    stops = np.append(starts[1:], len(begins)) - 1
    return begins[starts], ends[stops], painted[starts]


def _zero_extents(begins: _Ints, ends: _Ints, painted: _Ints, holes: _Ints) -> NDArray[np.void]:
    """The painted ranges without the blocks `holes` (sorted keys inside of them), which were written later."""
    starts = np.sort(np.concatenate([begins, holes + 1]))
    stops = np.sort(np.concatenate([ends, holes]))
    kept = starts < stops
    starts, stops = starts[kept], stops[kept]
    numbers = painted[np.searchsorted(begins, starts, side="right") - 1]
    counts = stops - starts
    pieces = -(-counts // _MAX_COUNT)
    if np.any(pieces > 1):
        row = np.repeat(np.arange(len(starts)), pieces)
        within = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts, stops, numbers = starts[row] + within * _MAX_COUNT, stops[row], numbers[row]
        counts = np.minimum(stops - starts, _MAX_COUNT)
    return _extents(starts, counts, EXTENT_ZEROS, 0, numbers)
