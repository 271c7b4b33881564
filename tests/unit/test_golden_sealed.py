"""The golden files of an encrypted store, which the engine reads too: both must find the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tests.golden.make_golden as golden
from pgcdp import keys, sealing, wrapped
from pgcdp.fsio import read_json
from pgcdp.keys import KeySource
from pgcdp.records import BLOCK, INDEX
from pgcdp.store.frames import FrameReader
from pgcdp.store.image_files import Sealed

HERE = Path(golden.__file__).resolve().with_name("sealed")
EXPECTED = json.loads((HERE / "expected.json").read_text("utf-8"))
SET_ID = bytes.fromhex(EXPECTED["set_id"])
INTERVAL = HERE / "0000000003"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[None]:
    """As a process has it that was given the user's key."""
    file = tmp_path / "key"
    file.write_text(EXPECTED["user_key"] + "\n")
    file.chmod(0o600)
    keys.give(KeySource(file))
    try:
        keys.open_store(HERE, SET_ID, True)
        yield
    finally:
        keys.give(None)
        sealing.forget(HERE)


def words(content: bytes) -> list[int]:
    """The word that each block is full of."""
    found = np.frombuffer(content, dtype=np.uint64).reshape(-1, BLOCK // 8)
    assert (found == found[:, :1]).all()
    return [int(word) for word in found[:, 0]]


def test_the_users_key_gives_the_data_key(opened: None) -> None:
    for file, content in wrapped.read(HERE):
        found = wrapped.data_key_in(file, content, bytes.fromhex(EXPECTED["user_key"]), SET_ID)
        assert found == bytes.fromhex(EXPECTED["data_key"])
    assert sealing.data_key_of(HERE) == bytes.fromhex(EXPECTED["data_key"])


def test_sealed_files_are_read_at_both_their_places(opened: None) -> None:
    assert read_json(HERE / "gaps.json") == EXPECTED["gaps.json"]
    assert read_json(INTERVAL / "settings.json") == EXPECTED["settings.json"]


def test_sealed_frames_are_read(opened: None) -> None:
    with FrameReader.open(INTERVAL / "index", b"INDX", SET_ID, 3) as reader:
        index = np.frombuffer(reader.read_stream(), dtype=INDEX)
    with FrameReader.open(INTERVAL / "writes", b"WRIT", SET_ID, 3) as reader:
        data = [reader.read(int(row["position"]), int(row["data_length"])) for row in index]
    assert index["number"].tolist() == [1, 2, 3]
    assert words(data[0] + data[2]) == EXPECTED["words"]["writes"]
    assert data[EXPECTED["mark"]["write"] - 1].decode() == EXPECTED["mark"]["name"]


def test_a_sealed_image_is_read(opened: None) -> None:
    image = HERE / "image"
    sealer = sealing.sealer_of(image / "wal.img")
    assert sealer is not None
    guard = Sealed(sealer, 1)
    entries = np.frombuffer((image / "wal.sums").read_bytes(), dtype=guard.dtype)
    content, wrong = guard.open(0, (image / "wal.img").read_bytes(), entries)
    assert not wrong.any()
    assert words(content) == EXPECTED["words"]["image"]
