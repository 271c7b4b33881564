"""An image of another moment than its state, as a copy of a live store has it: nothing is restored from it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from pgcdp import fsio
from pgcdp.errors import PreconditionError
from pgcdp.keys import KeySource
from pgcdp.looking import info
from pgcdp.records import BLOCK, Target
from pgcdp.recovery import restore
from pgcdp.recovery.source import Source
from pgcdp.store import agreement
from pgcdp.store.agreement import disagreement, refuse_disagreement
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import Image, read_state
from pgcdp.store.layout import Store
from pgcdp.store.scrub import check_store
from pgcdp.twice import STATE
from tests.small_store import BLOCKS, flip, make_store
from tests.unit.test_blockmap import Scene, materialized

SUFFIXES = {"img": BLOCK, "sums": 8}


def at(place: Path, intervals: int) -> Store:
    """The same history each time, as long as this."""
    place.mkdir()
    return make_store(place, intervals)


def mix(store: Store, other: Store, first: int = 0, last: int = BLOCKS) -> None:
    """Blocks `first` to `last` of the image are those of the other moment, with sums that fit."""
    for suffix, unit in SUFFIXES.items():
        into, of = (each.image / f"data.{suffix}" for each in (store, other))
        whole = bytearray(into.read_bytes())
        whole[first * unit : last * unit] = of.read_bytes()[first * unit : last * unit]
        into.write_bytes(whole)


def test_a_stale_image_is_refused_whatever_is_asked_for(tmp_path: Path) -> None:
    """The image was copied first, then the agent moved it on, then its state and the intervals were copied."""
    store = at(tmp_path / "new", 5)
    mix(store, at(tmp_path / "old", 3))
    assert check_store(store).ok, "no sum and no size tells"
    for target in (Target("newest"), Target("boundary", 1), Target("write", 17)):
        source = Source(Store.open(store.path))
        with pytest.raises(PreconditionError, match="made while it was written") as caught:
            restore.to_image(source, source.resolve(target), tmp_path / "restored")
        assert "behind pgcdp down or from a snapshot" in str(caught.value.hint)
        assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_an_image_that_is_newer_than_its_state_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest, encrypted: bool
) -> None:
    """The state was copied first."""
    if encrypted:
        request.getfixturevalue("key")
    store = at(tmp_path / "new", 5)
    content = {"state": "at", "boundary": 3, "write": 30}
    for name in STATE.names:
        fsio.write_json(store.image / name, content)
    found = disagreement(store)
    assert found is not None
    assert found.file == store.image / "data.img"
    assert f"{found.file} has at offset {found.offset} another block {found.offset // BLOCK} than" in found.message
    with pytest.raises(PreconditionError, match="not of boundary 3"):
        refuse_disagreement(store)


@pytest.mark.parametrize("block", range(0, BLOCKS // 2, 8))
def test_a_part_of_the_image_that_is_stale_is_found_where_one_of_two_intervals_changed_it(
    tmp_path: Path, block: int
) -> None:
    store, old = at(tmp_path / "new", 5), at(tmp_path / "old", 3)
    now = (store.image / "data.img").read_bytes()
    mix(store, old, block, block + 8)
    assert (disagreement(store) is None) == ((store.image / "data.img").read_bytes() == now)


def test_one_block_that_is_newer_is_found_by_what_the_next_intervals_found(tmp_path: Path) -> None:
    """With the newest intervals there, and the state of before them."""
    store, old, new = at(tmp_path / "mixed", 5), at(tmp_path / "old", 3), at(tmp_path / "new", 5)
    mix(store, old)
    for name in STATE.names:
        fsio.write_json(store.image / name, {"state": "at", "boundary": 3, "write": 30})
    assert disagreement(store) is None, "an image that lags is whole"
    before, changed = (store.image / "data.img").read_bytes(), 0
    for block in range(BLOCKS // 2):
        mix(store, new, block, block + 1)
        differs = (store.image / "data.img").read_bytes() != before
        assert (disagreement(store) is not None) == differs, block
        changed += differs
        mix(store, old)
    assert changed > 5


def test_info_of_such_a_copy_says_so_and_that_no_point_is_left(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene", 3, [9, 14, 7, 11], 8, 0)
    store = scene.world.store
    assert info(None, store.path)["damages"] == []
    write = scene.source().intervals()[1].to_write
    for name in STATE.names:
        fsio.write_json(store.image / name, {"state": "at", "boundary": 2, "write": write})
    told = info(None, store.path)
    (damage,) = told["damages"]
    assert "made while it was written" in damage["message"]
    assert damage["still"] == agreement.AGAIN
    assert told["lost"] == [{"from_write": 0, "to_write": None}]
    assert not any(each["restorable_by_write"] for each in told["intervals"])


@pytest.mark.parametrize("seed", range(6))
def test_no_whole_store_is_accused(tmp_path: Path, seed: int) -> None:
    """At a boundary, with intervals behind the image, killed in a move, by zeros and discards."""
    scene = Scene(tmp_path / "scene", seed, [9, 14, 7, 11], 8, 0)
    store = scene.world.store
    assert disagreement(store) is None
    bundle = scene.publish(5)
    assert disagreement(store) is None
    source = Source(Store.open(store.path))
    with source.held():
        assert materialized(source, source.resolve(Target("newest")), scene.place) == scene.at(len(scene.world.ops))
    scene.move_in_part(bundle)
    assert read_state(store).state == "moving"
    assert disagreement(store) is None


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_of_a_move_is_judged_by_all_blocks_that_do_not_move(tmp_path: Path, seed: int) -> None:
    scene = Scene(tmp_path / "scene", seed, [9, 14, 7, 11], 8, 0)
    store = scene.world.store
    scene.leave_moving(5)
    moving = {(row["volume"], row["block"] + at) for row in scene_map(store, 5) for at in range(row["count"])}
    still = {(row["volume"], row["block"] + at) for row in scene_map(store, 4) for at in range(row["count"])} - moving
    volume, block = sorted(still)[0]
    image = Image.open(store, writable=True)
    image.write_blocks(int(volume), int(block), bytes([seed + 1]) * BLOCK)
    image.sync()
    image.close()
    found = disagreement(store)
    assert found is not None
    assert found.offset == block * BLOCK


def scene_map(store: Store, number: int) -> list[dict[str, int]]:
    rows = Bundle.open(store, number).forward_map()
    return [{name: int(row[name]) for name in ("volume", "block", "count")} for row in rows]


def test_damage_is_told_as_damage_and_not_as_another_moment(tmp_path: Path, key: KeySource) -> None:
    store = at(tmp_path / "new", 3)
    for path in (store.image / "data.img", store.image / "data.sums", store.interval(3) / "writes"):
        raw = path.read_bytes()
        for where in range(0, len(raw), max(1, len(raw) // 40)):
            flip(path, where)
            assert disagreement(store) is None, (path, where)
            path.write_bytes(raw)
    shutil.rmtree(store.interval(3))
    assert disagreement(store) is None, "nothing tells of a boundary whose interval is lost"


def test_the_look_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = at(tmp_path / "new", 5)
    mix(store, at(tmp_path / "old", 3))
    monkeypatch.setattr(agreement, "SECONDS", -1.0)
    begun = time.monotonic()
    assert disagreement(store) is None
    assert time.monotonic() - begun < 1
