"""The golden files, which the engine's parser reads too: both must find the same."""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

import tests.golden.make_golden as golden
from pgcdp.capture.journal import Journal
from pgcdp.records import EXTENT_DATA, EXTENT_ZEROS
from pgcdp.recovery.mapfile import ImageSource, decode, encode
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


def test_map_reader_and_writer_mean_what_the_golden_map_says() -> None:
    path = HERE / "view.map"
    found = decode(path.read_bytes(), path)
    assert found.set_id == SET_ID
    assert [[v.name, v.bytes, image] for v, image in zip(found.volumes, found.images, strict=True)] == (
        EXPECTED["map"]["volumes"]
    )
    sources = [
        ["image", "", 0, str(source.path)]
        if isinstance(source, ImageSource)
        else ["frames", source.content.decode(), source.interval, str(source.path)]
        for source in found.sources
    ]
    assert sources == EXPECTED["map"]["sources"]
    kinds = {EXTENT_DATA: "data", EXTENT_ZEROS: "zeros"}
    extents = [[b, c, v, kinds[k], p, s] for b, c, v, k, p, s, _ in found.extents.tolist()]
    assert extents == EXPECTED["map"]["extents"]
    assert encode(found) == path.read_bytes()


def test_frame_reader_finds_what_is_in_the_golden_frames() -> None:
    wanted = EXPECTED["frames"]
    content, interval = wanted["content"].encode(), wanted["interval"]
    with FrameReader.open(HERE / "writes.frames", content, SET_ID, interval) as reader:
        assert [entry.raw for entry in reader.entries] == wanted["raw_lengths"]
        assert reader.read_stream() == b"".join(raw for _, raw in golden.GOLDEN_FRAMES)
