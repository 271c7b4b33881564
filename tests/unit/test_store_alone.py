"""A store alone, and one that is damaged in part: nothing is written into it, and all that is whole comes back."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from pgcdp import twice
from pgcdp.errors import DamageError
from pgcdp.looking import info
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery.left import hint_of, nearest, restorable
from pgcdp.recovery.materializing import Lacking
from pgcdp.recovery.source import Source
from pgcdp.store.catalog import catalog_file
from pgcdp.store.layout import Store
from pgcdp.store.notes import notes_of
from tests.journal_writer import BLOCK, DISCARD, Op
from tests.small_store import flip
from tests.unit.test_blockmap import Scene, materialized
from tests.unit.test_increments import BLOCKS, apply_op, boundary, capture, make_world, run_interval

State = dict[str, tuple[int, int, int, bytes]]


def state_of(place: Path) -> State:
    """Every file and directory: inode, mode, time of change, content."""
    found = {}
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(place))] = status.st_ino, status.st_mode, status.st_mtime_ns, content
    return found


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, 17, [9, 14, 7, 11], 8, 0)


@pytest.fixture
def clean_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "clean"
    root.mkdir()
    monkeypatch.setenv("PGCDP_ROOT", str(root))
    return root


@pytest.mark.parametrize("locks", ["copied", "left out"])
def test_a_copy_is_read_and_not_written(scene: Scene, clean_root: Path, locks: str) -> None:
    copy = scene.place / "copy"
    left_out = shutil.ignore_patterns("*lock") if locks == "left out" else None
    shutil.copytree(scene.world.store.path, copy, ignore=left_out)
    shutil.rmtree(scene.world.writer.directory)
    before = state_of(copy)
    for path in copy.rglob("*"):
        os.chown(path, 4711, 4711)
    ends = [each.to_write for each in Source(Store.open(copy)).intervals()]
    for write in range(1, len(scene.world.ops) + 1):
        source = Source(Store.open(copy))
        with source.held():
            assert materialized(source, source.resolve(Target("write", write)), scene.place) == scene.at(write)
    told = info(None, copy)
    assert [each["to_write"] for each in told["intervals"]] == ends
    assert told["damages"] == told["lost"] == []
    assert catalog_file(Store.open(copy)).is_relative_to(clean_root)
    assert state_of(copy) == before


def test_a_store_at_another_place_has_other_notes(scene: Scene) -> None:
    """A copy may be older than what it is one of."""
    copy = scene.place / "copy"
    shutil.copytree(scene.world.store.path, copy)
    assert notes_of(Store.open(copy)) != notes_of(scene.world.store)
    (scene.place / "link").symlink_to(copy)
    assert notes_of(Store.open(scene.place / "link")) == notes_of(Store.open(copy))


def test_a_store_that_was_exchanged_is_not_told_of_by_what_was_before(scene: Scene) -> None:
    """Brought back from a copy, another history has the same numbers."""
    store = scene.world.store.path
    info(None, store)
    other = Scene(scene.place / "other", 18, [5, 6, 7, 8], 3, 0)
    shutil.rmtree(store)
    shutil.copytree(other.world.store.path, store)
    ends = [each.to_write for each in other.source().intervals()]
    targets = [Target("boundary", number) for number in range(1, 5)] + [Target("write", each) for each in range(1, 27)]
    trusting = [Source(Store.open(store), trusting=True).resolve(target) for target in targets]
    assert [each.to_write for each in Source(Store.open(store)).intervals()] == ends
    assert [each["to_write"] for each in info(None, store)["intervals"]] == ends
    assert trusting == [Source(Store.open(store)).resolve(target) for target in targets]


@pytest.mark.parametrize("trusting", [False, True])
@pytest.mark.parametrize("catalog", ["whole", "none"])
@pytest.mark.parametrize("numbers", [[2], [2, 3], [4], [3, 4]])
@pytest.mark.parametrize("how", ["manifest", "directory"])
def test_what_lies_behind_a_lost_interval_is_listed_and_restored(
    scene: Scene, catalog: str, numbers: list[int], how: str, trusting: bool
) -> None:
    store = scene.world.store
    if catalog == "whole":
        info(None, store.path)
    ends = [0, *(each.to_write for each in scene.source().intervals())]
    for number in numbers:
        if how == "directory":
            shutil.rmtree(store.interval(number))
        else:
            file = store.interval(number) / "manifest.json"
            file.write_bytes(file.read_bytes()[:-30])
    if how == "directory" and 4 in numbers:
        pytest.skip("of the newest ones nothing is left that tells that they were there")
    lost = ends[numbers[-1]]
    told = info(None, store.path)
    assert told["lost"] == [{"from_write": 0, "to_write": lost - 1}]
    for each in told["intervals"]:
        gone = {write for run in each["lost"] for write in range(run["from_write"], run["to_write"] + 1)}
        assert gone == set(range(each["from_write"], min(each["to_write"], lost - 1) + 1))
        assert each["restorable_by_write"] == (not gone)
    for write in range(1, len(scene.world.ops) + 1):
        source = scene.source(trusting=trusting)
        if write < lost:
            with pytest.raises(DamageError, match=r"\(offset 0\)|at offset \d+") as caught:
                source.resolve(Target("write", write))
            assert f"--target-boundary {numbers[-1]} " in str(caught.value.hint), caught.value.hint
            continue
        with source.held():
            assert materialized(source, source.resolve(Target("write", write)), scene.place) == scene.at(write)


def test_no_lost_point_is_called_the_nearest_by_who_has_not_looked_at_it(scene: Scene) -> None:
    """A clone trusts the catalog, until what it needs is damaged."""
    store = scene.world.store
    info(None, store.path)
    write = scene.source().intervals()[1].from_write
    trusting, careful = scene.source(trusting=True), scene.source()
    trusting.resolve(Target("write", write))
    file = store.interval(3) / "manifest.json"
    file.write_bytes(file.read_bytes()[:-30])
    damage = f"{store.interval(2)}/backward has a damaged frame at offset 0"
    assert hint_of(trusting, write, damage) == hint_of(careful, write, damage)
    assert "--target-boundary 3 " in hint_of(careful, write, damage)


def test_what_is_lost_by_a_file_is_told_and_no_more(scene: Scene) -> None:
    """By names and sizes alone."""
    store = scene.world.store
    ends = [0, *(each.to_write for each in scene.source().intervals())]
    for name, first, last in (
        ("writes", ends[1] + 1, ends[2] - 1),
        ("index", ends[1] + 1, ends[2] - 1),
        ("backward", 0, ends[2] - 1),
        ("backward.map", 0, ends[2] - 1),
        ("forward.map", None, None),
    ):
        file = store.interval(2) / name
        whole = file.read_bytes()
        for content in (None, whole[:-1]):
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            told = info(None, store.path)
            assert [each["file"] for each in told["damages"]] == [str(file)]
            wanted = [] if first is None else [{"from_write": first, "to_write": last}]
            assert told["lost"] == wanted, name
            file.write_bytes(whole)
    assert info(None, store.path)["damages"] == []


def test_the_nearest_points_are_named(scene: Scene) -> None:
    source = scene.source()
    ends = [each.to_write for each in source.intervals()]
    writes = scene.world.store.interval(2) / "writes"
    writes.unlink()
    assert hint_of(source, ends[1] - 2, f"{writes} is missing (offset 0)") == (
        "the nearest that can be restored: --target-boundary 1 (2001-09-09T01:46:40.000000Z) before it, "
        "--target-boundary 2 (2001-09-09T01:46:40.000000Z) behind it"
    )
    states = [scene.world.store.image / name for name in twice.STATE.names]
    said = f"{states[0]} has a wrong checksum at offset 0"
    assert "no other point" not in hint_of(source, ends[1] - 2, said), "its other copy is whole"
    for state in states:
        flip(state, 0)
    assert "no other point" in hint_of(source, 5, said)


def test_runs_of_points_without_what_is_lost() -> None:
    assert restorable(5, [], 9, []) == [(5, 9)]
    assert restorable(5, [], 9, [(6, 7)]) == [(5, 5), (8, 9)]
    assert restorable(5, [], 9, [(0, 8)]) == [(9, 9)]
    assert restorable(5, [], 9, [(7, None)]) == [(5, 6)]
    assert restorable(5, [], 9, [(7, None), (0, 5)]) == [(6, 6)]
    assert nearest([(5, 6), (8, 9)], 7) == (6, 8)
    assert nearest([(5, 9)], 7) == (6, 8)
    assert nearest([(5, 6)], 9) == (6, None)
    assert nearest([], 9) == (None, None)


class Nowhere:
    """Takes everything."""

    def write_blocks(self, volume: int, block: int, data: bytes) -> None:
        """Nothing."""

    def zero_blocks(self, volume: int, block: int, count: int) -> None:
        """Nothing."""


def test_what_is_written_over_is_not_lacking_and_all_else_is() -> None:
    first, second = DamageError("first at offset 1"), DamageError("second at offset 2")
    target = Lacking(Nowhere())
    target.lose(0, 10, 6, first)
    target.write_blocks(1, 10, bytes(6 * BLOCK))
    target.write_blocks(0, 12, bytes(2 * BLOCK))
    target.zero_blocks(0, 5, 6)
    assert [run[:3] for run in target.lost] == [(0, 11, 12), (0, 14, 16)]
    target.lose(0, 15, 5, second)
    assert [run[:3] for run in target.lost] == [(0, 11, 12), (0, 14, 15), (0, 15, 20)]
    target.zero_blocks(0, 0, 15)
    with pytest.raises(DamageError, match="second"):
        target.refuse_lost()
    target.write_blocks(0, 15, bytes(5 * BLOCK))
    target.refuse_lost()


def test_a_damaged_increment_is_not_needed_where_an_older_one_has_the_block(tmp_path: Path) -> None:
    """Interval 2 changed every block: what was before it needs nothing of interval 3, whose writes lie above."""
    world = make_world(tmp_path)
    chooser = random.Random(3)
    run_interval(world, 1, "optimal", chooser, 20)
    everything = [Op(DISCARD, volume, 0, BLOCKS * BLOCK) for volume in (0, 1)]
    capture(world, everything, chooser)
    run_interval(world, 2, "optimal", chooser, 5)
    run_interval(world, 3, "optimal", chooser, 20)
    world.store = world.store.with_baseline(boundary(0, 0))
    ends = [each.to_write for each in Source(world.store).intervals()]
    file = world.store.interval(3) / "backward"
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    for write, comes_back in ((ends[0], True), (ends[0] - 1, True), (ends[1] - 1, True), (ends[1], False)):
        source = Source(world.store)
        with source.held():
            if comes_back:
                model = [bytearray(BLOCKS * BLOCK) for _ in range(2)]
                for op in world.ops[:write]:
                    apply_op(model, op)
                found = materialized(source, RecoveryPoint(write, None, 0), tmp_path)
                assert found == [bytes(volume) for volume in model], write
            else:
                with pytest.raises(DamageError, match="backward has a damaged frame"):
                    materialized(source, RecoveryPoint(write, None, 0), tmp_path)
