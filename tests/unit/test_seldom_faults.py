"""Faults at places that random ones hardly come by: taking up a torn file, and a hole in the image."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgcdp.records import BLOCK, Boundary, Volume
from pgcdp.store.frames import FrameReader, FrameWriter
from pgcdp.store.image import Image, read_state
from pgcdp.store.layout import Store
from tests.faults.service import Faults

SET_ID = bytes(range(16))


def resume(path: Path, durable: int) -> FrameWriter:
    return FrameWriter.resume(path, b"WRIT", SET_ID, 7, durable=durable, frame_bytes=1000)


@pytest.mark.parametrize("kind", ["eio", "enospc"])
def test_the_torn_end_of_an_open_interval_cannot_be_cut_off(tmp_path: Path, failing: Faults, kind: str) -> None:
    """What is durable stays, the torn end is no part of it, and the next try goes on behind the durable."""
    point = "store.frames.FrameWriter.resume.ftruncate"
    path = tmp_path / "writes"
    writer = FrameWriter.create(path, b"WRIT", SET_ID, 7, frame_bytes=1000)
    durable = bytes(range(250)) * 6
    writer.append(durable)
    writer.sync()
    writer.append(b"never synced" * 200)
    writer.close()
    with path.open("ab") as file:
        file.write(b"torn" * 100)
    failing.set(point, kind)
    with pytest.raises(OSError, match=r"Input/output error|No space left") as raised:
        resume(path, len(durable))
    assert raised.value.filename == str(path)
    assert failing.fired(point) == [point]
    writer = resume(path, len(durable))
    assert writer.length == len(durable)
    writer.append(b"behind it")
    writer.finish()
    with FrameReader.open(path, b"WRIT", SET_ID, 7) as reader:
        assert reader.read_stream() == durable + b"behind it"


@pytest.mark.parametrize("kind", ["eio", "enospc"])
def test_a_hole_cannot_be_made_in_the_image(tmp_path: Path, failing: Faults, kind: str) -> None:
    """The image is still moving, says so, and no zeros are served before they are there; done again it is whole."""
    point = "store.image.Image.write_blocks.punch"
    store = Store.create(tmp_path / "store", "main", SET_ID, [Volume(0, "data", 64 * BLOCK)])
    image = Image.create(store, 0)
    image.write_blocks(0, 0, b"x" * (8 * BLOCK))
    image.set_at(0, 4)
    image.close()
    store = store.with_baseline(Boundary(0, 4, 1, 1, 1, 1, 1, "baseline"))
    image = Image.open(store, writable=True)
    image.set_moving(1)
    failing.set(point, kind)
    with pytest.raises(OSError, match=r"Input/output error|No space left") as raised:
        image.write_blocks(0, 2, bytes(4 * BLOCK))
    assert str(raised.value.filename).endswith("data.img")
    assert failing.fired(point) == [point]
    image.close()
    assert (read_state(store).state, read_state(store).boundary) == ("moving", 0)
    again = Image.open(store, writable=True)
    assert again.read_blocks(0, 0, 8) == b"x" * (8 * BLOCK), "sums and blocks agree"
    again.write_blocks(0, 2, bytes(4 * BLOCK))
    again.set_at(1, 9)
    again.close()
    whole = Image.open(store)
    assert whole.read_blocks(0, 0, 8) == b"x" * (2 * BLOCK) + bytes(4 * BLOCK) + b"x" * (2 * BLOCK)
    assert read_state(store).state == "at"
    whole.close()
