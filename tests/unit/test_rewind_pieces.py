"""What a rewind reads at once, and what it writes of it: every block that may differ, and no other."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcdp.progress import silent
from pgcdp.records import BLOCK
from pgcdp.recovery.rewind import GAP_BLOCKS, PIECE_BLOCKS, ZERO_BLOCKS, Way, _bring_all, _runs, pieces

gaps_and_sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 700)), max_size=30)


@settings(deadline=None)
@given(first=gaps_and_sizes, second=gaps_and_sizes)
def test_pieces_hold_every_span(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    found = []
    for volume, made in enumerate((first, second)):
        at = 0
        for gap, size in made:
            found.append((volume, at + gap, size))
            at += gap + size
    wanted = {(volume, begin + n) for volume, begin, size in found for n in range(size)}
    cut = pieces(found)
    held = [(volume, begin + n) for volume, begin, size in cut for n in range(size)]
    assert len(held) == len(set(held)), "a block is in two pieces, which are written at the same time"
    assert wanted <= set(held)
    assert all(0 < size <= PIECE_BLOCKS for _, _, size in cut)
    assert len(held) <= len(wanted) + GAP_BLOCKS * len(found)


@settings(deadline=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(["same", "data", "zeros"]), st.integers(1, 40)), min_size=1, max_size=12)
)
def test_runs_are_the_blocks_that_differ(kinds: list[tuple[str, int]]) -> None:
    blocks = [kind for kind, count in kinds for _ in range(count)]
    differs = np.array([kind != "same" for kind in blocks], dtype=np.bool_)
    empty = np.array([kind == "zeros" for kind in blocks], dtype=np.bool_)
    written: list[int] = []
    for begin, end, zeros in _runs(differs, empty):
        written += range(begin, end)
        assert not zeros or (end - begin >= ZERO_BLOCKS and set(blocks[begin:end]) == {"zeros"})
    assert written == [number for number, kind in enumerate(blocks) if kind != "same"]


@pytest.mark.parametrize("way", [Way.TO_POINT, Way.TO_CAPTURE])
def test_a_device_that_takes_nothing_is_told_as_that(tmp_path: Path, way: Way) -> None:
    """As one whose capture process died. What could not be written kept the memory from being given back, and the
    command ended with an error of that."""
    (tmp_path / "view").write_bytes(random.Random(3).randbytes(64 * BLOCK))
    view, full = os.open(tmp_path / "view", os.O_RDONLY), os.open("/dev/full", os.O_RDWR)
    device = {Way.TO_POINT: (full, view), Way.TO_CAPTURE: (view, full)}[way]
    try:
        with pytest.raises(OSError, match=r"No space left|Bad file descriptor"):
            _bring_all([device], [(0, 0, 32), (0, 32, 32)], way, silent)
    finally:
        os.close(view)
        os.close(full)
