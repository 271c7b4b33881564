"""Frames files: what is appended is read back, whatever was torn is cut, whatever was flipped is found."""

from __future__ import annotations

import os
import random
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcdp.errors import DamageError
from pgcdp.store.frames import FRAME_BYTES, FrameReader, FrameWriter

SET_ID = bytes(range(16))


def create(path: Path, frame_bytes: int = 1000) -> FrameWriter:
    return FrameWriter.create(path, b"WRIT", SET_ID, 7, frame_bytes=frame_bytes)


def open_reader(path: Path, unfinished: bool = False) -> FrameReader:
    return FrameReader.open(path, b"WRIT", SET_ID, 7, unfinished=unfinished, cache_bytes=3000)


def resume(path: Path, durable: int | None = None) -> FrameWriter:
    return FrameWriter.resume(path, b"WRIT", SET_ID, 7, durable=durable, frame_bytes=1000)


def noise(seed: int, size: int) -> bytes:
    chooser = random.Random(seed)
    return b"".join(chooser.choice([chooser.randbytes(8), bytes(8), b"abcdefgh"]) for _ in range(-(-size // 8)))[:size]


def test_a_write_that_failed_is_written_by_the_next_sync(tmp_path: Path) -> None:
    writer = create(tmp_path / "writes")
    content = noise(1, 2500)
    writer.append(content[:1500])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.file_bytes + 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.append(content[1500:]) == 1500
    writer.sync()
    with writer.reader() as reader:
        assert reader.read_stream() == content
    writer.finish()
    with open_reader(tmp_path / "writes") as reader:
        assert reader.read_stream() == content


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 3500), st.sampled_from(["", "", "sync", "reopen"])), max_size=12),
    seed=st.integers(0, 1000),
)
def test_everything_appended_is_read_back(
    pieces: list[tuple[int, str]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("frames") / "writes"
    writer = create(path)
    model = b""
    for number, (size, then) in enumerate(pieces):
        piece = noise(seed + number, size)
        assert writer.append(piece) == len(model)
        model += piece
        if then:
            writer.sync()
        if then == "reopen":
            writer.close()
            writer = resume(path)
            assert writer.length == len(model)
    with writer.reader() as reader:
        assert reader.read_stream() == model
    summary = writer.finish()
    assert (summary.length, summary.bytes) == (len(model), path.stat().st_size)
    with open_reader(path) as reader:
        assert b"".join(raw for _, raw in reader.frames()) == model
        chooser = random.Random(seed)
        for _ in range(20):
            begin = chooser.randrange(len(model) + 1)
            end = chooser.randrange(begin, len(model) + 1)
            assert reader.read(begin, end - begin) == model[begin:end]
        with pytest.raises(DamageError, match="are missing"):
            reader.read(len(model), 1)


def test_cut_to_any_length_and_go_on(tmp_path: Path) -> None:
    model = noise(1, 5000)
    for length in [*range(0, 5000, 333), 1000, 2000, 5000]:
        path = tmp_path / "writes"
        writer = create(path)
        writer.append(model)
        writer.sync()
        writer.cut(length)
        writer.append(b"behind")
        summary = writer.finish()
        with open_reader(path) as reader:
            assert reader.read_stream() == model[:length] + b"behind"
        assert summary.checksum == resume(path).finish().checksum


def test_torn_at_any_byte_keeps_what_was_synced(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    model = noise(2, 4500)
    writer.append(model[:2500])
    writer.sync()
    synced = path.stat().st_size
    writer.append(model[2500:])
    writer.flush()
    raw = path.read_bytes()
    for size in range(synced, len(raw)):
        path.write_bytes(raw[:size])
        with open_reader(path, unfinished=True) as reader:
            seen = reader.read_stream()
        assert model.startswith(seen)
        writer = resume(path, durable=2500)
        assert writer.length == 2500
        writer.append(model[writer.length :])
        writer.finish()
        with open_reader(path) as reader:
            assert reader.read_stream() == model
    for size in range(synced):
        path.write_bytes(raw[:size])
        with pytest.raises(DamageError, match="offset"):
            resume(path, durable=2500)


def test_killed_while_finishing(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    model = noise(3, 4500)
    writer.append(model)
    writer.flush()
    before = path.stat().st_size
    summary = writer.finish()
    raw = path.read_bytes()
    for size in range(before, len(raw) + 1):
        path.write_bytes(raw[:size])
        writer = resume(path, durable=4500)
        assert writer.length == 4500
        assert writer.finish() == summary
        assert path.read_bytes() == raw


def test_one_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    model = noise(4, 3500) + os.urandom(1500)
    writer.append(model)
    writer.finish()
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        with pytest.raises(DamageError, match=r"writes .*offset \d+"), open_reader(path) as reader:
            reader.read_stream()


def test_damage_in_the_middle_is_never_cut_off_as_a_tail(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    writer.append(noise(5, 4500))
    writer.sync()
    raw = path.read_bytes()
    middle = writer.entries[2].offset
    path.write_bytes(raw[: middle + 40] + bytes([raw[middle + 40] ^ 1]) + raw[middle + 41 :])
    with pytest.raises(DamageError, match=f"damaged at offset {middle}, valid frames follow"):
        resume(path)
    with pytest.raises(DamageError, match=f"damaged at offset {middle}"):
        resume(path, durable=4500)
    assert path.stat().st_size == len(raw)
    assert resume(path, durable=2000).length == 2000


def test_file_of_another_interval_or_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    create(path).finish()
    for content, set_id, interval in ((b"INDX", SET_ID, 7), (b"WRIT", bytes(16), 7), (b"WRIT", SET_ID, 8)):
        with pytest.raises(DamageError, match="wrong header at offset 0"):
            FrameReader.open(path, content, set_id, interval)


@pytest.mark.parametrize("lie", ["none", "position", "offset"])
def test_a_directory_that_lies_is_found(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    writer.append(noise(8, 2500))
    writer.flush()
    if lie == "none":
        writer.entries = []
    else:
        second = writer.entries[1]
        writer.entries[1] = replace(second, **{lie: getattr(second, lie) + 1})
    writer.finish()
    with pytest.raises(DamageError, match="does not fit its frames"):
        open_reader(path)


def test_incompressible_frames_are_stored_plain(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    model = os.urandom(3000)
    writer.append(model)
    assert writer.finish().bytes < 3400
    with open_reader(path) as reader:
        assert reader.read(0, 3000) == model


def test_the_last_frame_alone_is_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    model = noise(7, 2800) + os.urandom(1700)
    writer.append(model)
    writer.flush()
    growing = path.stat().st_size
    writer.finish()
    raw = path.read_bytes()
    for size in [*range(64, len(raw), 7), growing, len(raw)]:
        path.write_bytes(raw[:size])
        with open_reader(path, unfinished=True) as whole, FrameReader.open_end(path, b"WRIT", SET_ID, 7) as end:
            assert end.entries == whole.entries[-1:]
            assert end.length == whole.length
            if end.entries:
                begin = end.entries[0].position
                assert end.read(begin, end.length - begin) == model[begin : end.length]


def test_the_last_frame_behind_a_long_broken_tail(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = FrameWriter.create(path, b"WRIT", SET_ID, 7)
    for _ in range(8):
        writer.append(os.urandom(FRAME_BYTES))
    writer.sync()
    second, third = writer.entries[1:3]
    with path.open("r+b") as file:
        for entry in writer.entries[2:]:
            file.seek(entry.offset + 100)
            file.write(bytes(8))
    with pytest.raises(DamageError, match=f"writes is damaged at offset {third.offset}, where its last frame begins"):
        FrameReader.open_end(path, b"WRIT", SET_ID, 7)
    os.truncate(path, third.offset + 200)
    with FrameReader.open_end(path, b"WRIT", SET_ID, 7) as end:
        assert end.entries == [second]


def test_damage_in_the_middle_is_never_a_shorter_stream(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    writer.append(noise(5, 4500))
    writer.sync()
    raw = path.read_bytes()
    for entry in writer.entries[:-1]:
        for at in (0, 5, 10, 18, 22, 30, 40):
            flipped = entry.offset + at
            path.write_bytes(raw[:flipped] + bytes([raw[flipped] ^ 1]) + raw[flipped + 1 :])
            with pytest.raises(DamageError, match=f"writes is damaged at offset {entry.offset}, valid frames follow"):
                open_reader(path, unfinished=True)
    last = writer.entries[-1].offset
    for at in (0, 5, 10, 18, 23, 30, 40):
        path.write_bytes(raw[: last + at] + bytes([raw[last + at] ^ 1]) + raw[last + at + 1 :])
        with pytest.raises(DamageError, match=f"writes is damaged at offset {last}"):
            open_reader(path, unfinished=True)
        with pytest.raises(DamageError, match=f"writes is damaged at offset {last}"):
            FrameReader.open_end(path, b"WRIT", SET_ID, 7)


def test_cache_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    writer = create(path)
    writer.append(noise(6, 50000))
    writer.finish()
    with open_reader(path) as reader:
        for at in range(0, 49000, 700):
            reader.read(at, 900)
            assert sum(len(raw) for raw in reader._cache.values()) <= 3000
