"""The golden files, which the engine's parser reads too: both must find the same."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

import tests.golden.make_golden as golden
from pgcdp.capture.journal import Journal
from pgcdp.store.frames import FrameReader

HERE = Path(golden.__file__).resolve().parent
EXPECTED = json.loads((HERE / "expected.json").read_text("utf-8"))
SET_ID = bytes.fromhex(EXPECTED["set_id"])
NAMES = ("number", "kind", "volume", "offset", "length", "wall_ns", "boot_ns")


def test_journal_reader_finds_what_is_in_the_golden_journal() -> None:
    journal = Journal(HERE / "journal", SET_ID)
    found = []
    sizes = []
    for run in journal.batches(0, None):
        for i, record in enumerate(run.records):
            row = {name: int(record[name]) for name in NAMES}
            found.append({**row, "data_xxh3": xxhash.xxh3_64_hexdigest(run.data_of(i).tobytes())})
        first = run.first_write - 1
        for end in run.batch_ends.tolist():
            sizes.append(end - first)
            first = end
        end_position = run.end
    assert found == EXPECTED["records"]
    assert sizes == EXPECTED["batches"]
    assert (end_position.segment, end_position.offset) == (EXPECTED["end"]["segment"], EXPECTED["end"]["offset"])
    assert journal.last_write() == EXPECTED["end"]["last_write"]
    mark = journal.applied_mark()
    assert mark is not None
    wanted = EXPECTED["mark"]
    assert (mark.applied_write, mark.released_write, mark.durable_write, mark.clean) == (
        wanted["applied"],
        wanted["released"],
        wanted["durable"],
        wanted["clean"],
    )


def test_frame_reader_finds_what_is_in_the_golden_frames() -> None:
    wanted = EXPECTED["frames"]
    content, interval = wanted["content"].encode(), wanted["interval"]
    with FrameReader.open(HERE / "writes.frames", content, SET_ID, interval) as reader:
        assert [entry.raw for entry in reader.entries] == wanted["raw_lengths"]
        assert reader.read_stream() == b"".join(raw for _, raw in golden.GOLDEN_FRAMES)
