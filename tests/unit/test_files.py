"""Whose the changed blocks are: no block may bear another's name. Against a model that asks block by block."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgcdp.capture.filemap import FileMap
from pgcdp.intervals.files import changed_files
from pgcdp.records import EXTENT, FILE_EXTENT

BLOCKS = 24
FREE, OWN, SILENT = "free", "own", "silent"
Block = tuple[int, int]
"""Volume and block."""
Layout = dict[Block, tuple[str, int] | str]
"""A file's path and block in it, FREE, OWN for the filesystem's own, SILENT where the filesystem cannot tell."""

layouts = st.lists(
    st.one_of(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 5)), st.sampled_from([FREE, FREE, OWN])),
    min_size=2 * BLOCKS,
    max_size=2 * BLOCKS,
)


def layout(drawn: list[tuple[str, int] | str], silent: int | None) -> Layout:
    places = {(at // BLOCKS, at % BLOCKS): each for at, each in enumerate(drawn)}
    return {place: SILENT if place[0] == silent and isinstance(each, str) else each for place, each in places.items()}


def file_map(of: Layout, silent: int | None) -> FileMap:
    paths = tuple(sorted({each[0] for each in of.values() if isinstance(each, tuple)}))
    files = [(b, 1, v, each[1], paths.index(each[0])) for (v, b), each in sorted(of.items()) if isinstance(each, tuple)]
    free = [(b, 1, v, 0, 0) for (v, b), each in sorted(of.items()) if each == FREE]
    told = frozenset({0, 1} - {silent})
    return FileMap(np.array(files, FILE_EXTENT), paths, np.array(free, FILE_EXTENT), told)


@given(
    now=layouts,
    before=st.none() | layouts,
    changed=st.sets(st.tuples(st.integers(0, 1), st.integers(0, BLOCKS - 1))),
    silent=st.sampled_from([None, 0, 1]),
)
def test_every_block_bears_the_name_that_the_filesystem_gives(
    now: list[tuple[str, int] | str],
    before: list[tuple[str, int] | str] | None,
    changed: set[Block],
    silent: int | None,
) -> None:
    forward = np.array([(b, 1, v, 0, 0, 1) for v, b in sorted(changed)], dtype=EXTENT)
    is_now = layout(now, silent)
    was = None if before is None else layout(before, silent)
    table = changed_files(forward, None if was is None else file_map(was, silent), file_map(is_now, silent))
    told: dict[bool, Layout] = {False: {}, True: {}}
    for row in table.to_pylist():
        for number in range(row["count"]):
            place = row["volume"], row["block"] + number
            assert place not in told[row["earlier"]]
            told[row["earlier"]][place] = OWN if row["path"] is None else (row["path"], row["at"] + number)
    known = {place: each for place, each in is_now.items() if place in changed and each not in (FREE, SILENT)}
    assert told[False] == known
    other = {} if was is None else {place: was[place] for place in changed if was[place] != is_now[place]}
    assert told[True] == {place: each for place, each in other.items() if each not in (FREE, SILENT)}
