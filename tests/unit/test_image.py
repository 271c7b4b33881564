"""The image of a store: its states, its blocks against a model, growth, and what cannot be written."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from pgcdp.errors import BugError, PreconditionError
from pgcdp.records import BLOCK, Volume
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import Image, ImageState, read_state
from pgcdp.store.image_files import block_sums, is_zero
from pgcdp.store.layout import Store
from pgcdp.store.scrub import check_store
from tests.small_store import BLOCKS, SET_ID, flip, make_store


def test_moving_blocks_are_not_judged_and_all_others_are(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    image = Image.open(store, writable=True)
    image.set_at(2, 20)
    image.set_moving(3)
    image.close()
    block = int(Bundle.open(store, 3).forward_map()["block"][0])
    flip(store.image / "data.img", block * BLOCK)
    assert check_store(store).ok
    flip(store.image / "data.img", (BLOCKS - 1) * BLOCK)
    assert [damage.offset for damage in check_store(store).damages] == [(BLOCKS - 1) * BLOCK]


def test_image_states_go_one_way(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)])
    with pytest.raises(PreconditionError, match="there is no image"):
        Image.open(store)
    image = Image.create(store, 7)
    image.set_baseline(9, {"data": 4096})
    assert read_state(store) == ImageState("baseline", from_write=7, journal_write=9, copied={"data": 4096})
    with pytest.raises(BugError):
        image.set_moving(1)
    image.set_at(0, 12)
    with pytest.raises(BugError):
        image.set_baseline(1, {})
    with pytest.raises(BugError):
        image.set_moving(2)
    image.set_moving(1)
    assert read_state(store) == ImageState("moving", boundary=0, write=12, to=1)
    image.close()


def test_image_against_a_model(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", 5000 * BLOCK)])
    image = Image.create(store, 1)
    model = bytearray(5000 * BLOCK)
    chooser = random.Random(1)
    for step in range(300):
        block = chooser.randrange(5000)
        count = chooser.randrange(1, min(5000 - block, chooser.choice([3, 3, 5000])) + 1)
        if chooser.random() < 0.3:
            image.zero_blocks(0, block, count)
            model[block * BLOCK : (block + count) * BLOCK] = bytes(count * BLOCK)
        else:
            data = (chooser.randbytes(16) * (count * BLOCK // 16)) if chooser.random() < 0.8 else bytes(count * BLOCK)
            image.write_blocks(0, block, data)
            model[block * BLOCK : (block + count) * BLOCK] = data
        if step % 20 == 0:
            whole = b"".join(data or bytes(n * BLOCK) for _, n, data in image.contents(0, 0, 5000))
            assert whole == model
            assert image.read_blocks(0, block, count) == model[block * BLOCK : (block + count) * BLOCK]
    image.close()
    assert (store.image / "data.img").read_bytes() == model
    assert (
        np.frombuffer((store.image / "data.sums").read_bytes(), dtype=np.uint64).tolist() == block_sums(model).tolist()
    )


def test_an_image_that_grows_is_zeros_behind_its_end(tmp_path: Path) -> None:
    """Whatever the files have there: blocks and sums would differ from the volume's."""
    store = make_store(tmp_path)
    for name in ("data.img", "data.sums"):
        with (store.image / name).open("ab") as file:
            file.write(random.Random(5).randbytes(2 * BLOCK))
    image = Image.open(store, writable=True)
    before = image.read_blocks(0, 0, BLOCKS)
    larger = image.grow(0, (BLOCKS + 4) * BLOCK)
    assert image.read_blocks(0, 0, BLOCKS) == before
    assert image.read_blocks(0, BLOCKS, 4) == bytes(4 * BLOCK)
    image.close()
    assert Store.open(store.path).volumes == larger.volumes == (Volume(0, "data", (BLOCKS + 4) * BLOCK),)
    assert check_store(larger).ok


def test_volumes_that_were_put_back_are_not_in_use(tmp_path: Path) -> None:
    volumes = [Volume(0, "data", BLOCK), Volume(1, "ts-one", BLOCK)]
    facts = {"mountpoints": {"data": "/pg"}, "filesystems": {"data": "ext4"}}
    store = Store.create(tmp_path / "store", "s", SET_ID, volumes, facts)
    assert [volume.name for volume in store.in_use] == ["data"]
    store = store.mounted("ts-one", Path("/one"), "xfs", 7)
    assert [volume.name for volume in Store.open(store.path).in_use] == ["data", "ts-one"]
    store = store.unmounted("ts-one")
    assert Store.open(store.path).in_use == store.in_use == (volumes[0],)
    assert store.since == {}


def test_an_image_that_cannot_be_written_can_be_closed(tmp_path: Path) -> None:
    """The agent closes what failed and goes on later: it must not fail at that and end."""
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)])
    image = Image.create(store, 1)
    image.write_blocks(0, 0, b"x" * BLOCK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            image.sync()
        image.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_lies_behind_the_end_of_cut_short_sums_is_no_bug(tmp_path: Path) -> None:
    """No entry is there to be judged, which is damage for who asks, and nothing that ends a scrub."""
    assert is_zero(np.zeros(0, dtype=np.uint64)).tolist() == []
    store = make_store(tmp_path)
    os.truncate(store.image / "data.sums", 0)
    assert not check_store(store).ok
