"""Pure: whose the blocks are that an interval changed, by maps of the filesystem at its two boundaries."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.capture.filemap import METADATA, UNKNOWN, VOLUME_SHIFT, FileMap
from pgcdp.records import EXTENT_DATA
from pgcdp.store.files import SCHEMA

_Ints = NDArray[np.int64]


def changed_files(forward: NDArray[np.void], before: FileMap | None, now: FileMap) -> pa.Table:
    """The owners of the blocks that the data extents of a forward map name: `store.files.SCHEMA`.

    What nobody owns now, and nobody did before, has no row. What had another owner before has a row for each.
    """
    keys = _blocks(forward)
    names: dict[str, int] = {}
    owner, at = _owners(now, keys, names)
    runs = [_runs(keys, owner, at, earlier=False)]
    if before is not None:
        was, was_at = _owners(before, keys, names)
        other = (was != owner) | ((was >= 0) & (was_at != at))
        runs.append(_runs(keys[other], was[other], was_at[other], earlier=True))
    columns = [np.concatenate(each) for each in zip(*runs, strict=True)]
    order = np.lexsort((columns[0], columns[4]))
    key, count, owner, at, earlier = (column[order] for column in columns)
    path = pa.DictionaryArray.from_arrays(
        pa.array(np.maximum(owner, 0).astype(np.int32), mask=owner < 0), pa.array(list(names) or [""], pa.string())
    )
    block = (key & ((1 << VOLUME_SHIFT) - 1)).astype(np.uint64)
    values = [(key >> VOLUME_SHIFT).astype(np.uint16), block, count.astype(np.uint32), at.astype(np.uint64)]
    return pa.table([*values, path, earlier.astype(np.bool_)], schema=SCHEMA)


def _blocks(forward: NDArray[np.void]) -> _Ints:
    """Each block as a key, rising."""
    data = forward[forward["kind"] == EXTENT_DATA]
    count = data["count"].astype(np.int64)
    begin = (data["volume"].astype(np.int64) << VOLUME_SHIFT) + data["block"].astype(np.int64)
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    keys: _Ints = np.repeat(begin, count) + within
    return keys


def _owners(files: FileMap, keys: _Ints, names: dict[str, int]) -> tuple[_Ints, _Ints]:
    """Owners with files numbered by `names`, which grows; which block of its file each is."""
    owner, at = files.owners(keys)
    used = np.unique(owner[owner >= 0])
    number = np.full(len(files.paths) + 1, UNKNOWN, dtype=np.int64)
    for each in used.tolist():
        number[each] = names.setdefault(files.paths[each], len(names))
    return np.where(owner >= 0, number[np.maximum(owner, 0)], owner), at


def _runs(keys: _Ints, owner: _Ints, at: _Ints, *, earlier: bool) -> tuple[_Ints, _Ints, _Ints, _Ints, _Ints]:
    """Blocks that follow each other in one file as one: first key, count, owner, block in the file, `earlier`."""
    told = owner != UNKNOWN
    keys, owner, at = keys[told], owner[told], np.where(owner[told] == METADATA, 0, at[told])
    if not len(keys):
        none = np.empty(0, dtype=np.int64)
        return none, none, none, none, none
    follows = (np.diff(keys) == 1) & (np.diff(owner) == 0) & ((owner[1:] == METADATA) | (np.diff(at) == 1))
    starts = np.flatnonzero(np.append(True, ~follows))
    counts = np.diff(np.append(starts, len(keys)))
    return keys[starts], counts, owner[starts], at[starts], np.full(len(starts), int(earlier), dtype=np.int64)
