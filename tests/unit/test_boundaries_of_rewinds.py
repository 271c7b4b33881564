"""Where boundaries are when production is rewound in place, or a gap was taken in: never inside, and behind it by what
was written back."""

from __future__ import annotations

import struct
from pathlib import Path

import google_crc32c
import pytest

from pgcdp.capture.journal import Journal
from pgcdp.intervals.applying import run_index
from pgcdp.intervals.cutter import CheckpointFinder
from tests.golden.make_golden import BLOCK, MARK, SET_ID, Item, JournalMaker, write

IDENTIFIER = 7_000_000_000_000_000_001


def control(checkpoint_lsn: int) -> Item:
    """A write of pg_control of PostgreSQL 15 that names a checkpoint."""
    raw = bytearray(288)
    struct.pack_into("<QII", raw, 0, IDENTIFIER, 1300, 202209061)
    struct.pack_into("<QQ", raw, 32, checkpoint_lsn, checkpoint_lsn - 56)
    return write(0, 8 * BLOCK, (bytes(raw) + struct.pack("<I", google_crc32c.value(bytes(raw)))).ljust(BLOCK, b"\0"))


BEGIN, END = Item(MARK, 65535, 0, b"7", flags=1), Item(MARK, 65535, 0, b"7", flags=2)
TRACKED, HEALED = Item(MARK, 65535, 0, b"untracked 5", flags=3), Item(MARK, 65535, 0, b"untracked 5", flags=4)
GAP, GAP_END = Item(MARK, 65535, 0, b"changed 5", flags=3), Item(MARK, 65535, 0, b"changed 5", flags=4)
HISTORIES: dict[str, tuple[list[Item], list[int]]] = {
    "back, and a later checkpoint with a lower LSN than was captured before": (
        [control(5000), BEGIN, control(2000), END, control(2000), control(2500), control(3000)],
        [1, 6, 7],
    ),
    "undone: a higher one is written back": ([BEGIN, control(9000), END, control(9000), control(9500)], [5]),
    "nothing of pg_control differs": ([control(5000), BEGIN, END, control(5000), control(5001)], [1, 5]),
    "begun twice, after a kill": ([BEGIN, control(2000), BEGIN, END, control(2000), control(2001)], [6]),
    "older copies of it are written back behind it": (
        [control(5000), BEGIN, control(2000), control(1500), END, control(2000), control(2500)],
        [1, 7],
    ),
    "a gap with checkpoints of a Postgres that ran while nobody captured it": (
        [control(5000), GAP, control(6000), GAP_END, control(6000), control(6500)],
        [1, 6],
    ),
    "an older pg_control was put there while nobody captured it": (
        [control(5000), GAP, control(2000), GAP_END, control(2500)],
        [1, 5],
    ),
    "changes were tracked": ([control(5000), TRACKED, control(6000), HEALED, control(6500), GAP, GAP_END], [1, 5]),
}


@pytest.mark.parametrize("what", HISTORIES)
@pytest.mark.parametrize("stored", [False, True], ids=["in the journal", "in the open interval"])
def test_boundaries(tmp_path: Path, what: str, stored: bool) -> None:
    items, expected = HISTORIES[what]
    maker = JournalMaker(tmp_path / "j", segment_bytes=64 * BLOCK)
    maker.segment()
    for item in items:
        maker.batch(item)
    finder = CheckpointFinder(IDENTIFIER, 1000)
    found = []
    for run in Journal(tmp_path / "j", SET_ID).batches(0, None):
        if stored:
            data = run.data.tobytes()
            found += finder.scan_stored(run_index(run), _Stream(data))  # type: ignore[arg-type]
        else:
            found += finder.scan(run)
    assert [checkpoint.write for checkpoint in found] == expected
    assert finder.rewound == max(number for number, item in enumerate(items, 1) if item in (END, GAP_END))
    assert finder.healed == (items.index(HEALED) + 1 if HEALED in items else -1), "a boundary is asked for behind it"


class _Stream:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, position: int, length: int) -> bytes:
        return self.data[position : position + length]
