"""Merged increments say the same as the increments that they were made of, however many of them are there."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcdp.errors import DamageError
from pgcdp.records import EXTENT_DATA, RecoveryPoint, Span
from pgcdp.recovery import merged
from pgcdp.recovery.blockmap import flatten
from pgcdp.recovery.merged import backward_layers, cover, due, known, merge, merge_due
from tests.unit.test_blockmap import Scene, by_block, served


@given(
    fanout=st.integers(2, 5),
    first=st.integers(1, 300),
    count=st.integers(1, 300),
    seed=st.integers(0, 10**9),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_spans_cover_every_interval_once(fanout: int, first: int, count: int, seed: int, share: float) -> None:
    chooser = random.Random(seed)
    last = first + count - 1
    there = {span for span in due(1, 700, (), fanout) if chooser.random() < share}
    spans = cover(first, last, there, fanout)
    assert [n for span in spans for n in range(span.last, span.first - 1, -1)] == list(range(last, first - 1, -1))
    assert all(span.first == span.last or span in there for span in spans)
    if share == 1.0:
        digits, size = 1, fanout
        while size <= count:
            digits, size = digits + 1, size * fanout
        assert len(spans) <= 2 * (fanout - 1) * digits, "few maps for many intervals"


def test_ten_thousand_intervals_back_are_few_maps() -> None:
    there = set(due(1, 10_000, (), merged.FANOUT))
    assert len(there) == 625 + 39 + 2
    assert len(cover(1, 10_000, there, merged.FANOUT)) <= 30
    assert list(due(1, 10_000, there, merged.FANOUT)) == []
    assert min(due(500, 10_000, (), merged.FANOUT)).first == 513, "what retention has let go of is not merged"


def test_check_names_what_is_damaged(tmp_path: Path) -> None:
    store = Scene(tmp_path, 5, [4] * 17, 0, 0).world.store
    merge_due(store)
    assert merged.check(store, full=False) == (1, 0, [])
    paced: list[int] = []
    count, size, damages = merged.check(store, full=True, pace=paced.append)
    assert sum(paced) == size
    assert (count, damages) == (1, [])
    assert size
    (span,) = known(store)
    path = store.merged / span.file_name
    raw = bytearray(path.read_bytes())
    raw[70] ^= 1
    path.write_bytes(raw)
    (damage,) = merged.check(store, full=True)[2]
    assert str(path) in damage.message
    path.write_bytes(raw[:20])
    assert merged.check(store, full=False)[2]
    assert path.exists(), "to look is not to mend"


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    sizes=st.lists(st.integers(0, 12), min_size=2, max_size=12),
    moving=st.booleans(),
)
def test_all_maps_give_the_same_bytes(
    seed: int, sizes: list[int], moving: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Merged by two, by four, by eight, any of them missing; made of singles or of smaller ones."""
    place = tmp_path_factory.mktemp("scene")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merged, "FANOUT", 2)
        compare_maps(place, seed, sizes, moving)
    shutil.rmtree(place)


def compare_maps(place: Path, seed: int, sizes: list[int], moving: bool) -> None:
    scene = Scene(place, seed, [size + 1 for size in sizes], 5, 5)
    if moving:
        scene.leave_moving(len(sizes) + 1)
    store, chooser = scene.world.store, scene.chooser
    newest = store.interval_numbers()[-1]
    first = chooser.randrange(1, newest + 1)
    plain = by_block(flatten(backward_layers(store, first, newest)))
    for span in due(1, newest, (), 2):
        if chooser.random() < 0.7:
            merge(store, span)
    assert by_block(flatten(backward_layers(store, first, newest))) == plain
    for write in {0, *(chooser.randrange(len(scene.world.ops) + 1) for _ in range(4))}:
        scene.assert_view_is_right(write)
        scene.assert_blank_is_right(write)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, 7, [3] * 37, 4, 4)


def test_a_point_far_back_is_opened_without_the_maps_between(scene: Scene) -> None:
    store = scene.world.store
    assert merge_due(store) == 2
    assert known(store) == {Span(1, 16), Span(17, 32)}
    assert merge_due(store) == 0
    for number in (1, 5, 20, 32):
        path = store.interval(number) / "backward.map"
        path.write_bytes(bytes(path.stat().st_size))
    assert served(scene.mapped(RecoveryPoint(0, None, 0))) == scene.at(0)
    view = scene.mapped(RecoveryPoint(48, None, 0))
    assert served(view) == scene.at(48)
    needed = set(np.unique(view.extents["source"][view.extents["kind"] == EXTENT_DATA]).tolist())
    assert needed <= set(range(len(view.sources)))


def test_what_cannot_be_merged_does_not_keep_the_others(scene: Scene) -> None:
    store = scene.world.store
    path = store.interval(3) / "backward.map"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DamageError, match=str(path)):
        merge_due(store)
    assert known(store) == {Span(17, 32)}


def test_a_damaged_one_costs_nothing_but_time(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    store = scene.world.store
    merge_due(store)
    file = store.merged / "0000000017-0000000032"
    raw = bytearray(file.read_bytes())
    for at in (20, len(raw) // 2, len(raw) - 10):
        raw[at] ^= 1
        file.write_bytes(raw)
        raw[at] ^= 1
        assert served(scene.mapped(RecoveryPoint(0, None, 0))) == scene.at(0), f"a flip at {at}"
        assert not file.exists()
        assert str(file) in caplog.text
        assert merge_due(store) == 1
        assert file.read_bytes() == bytes(raw), "it is made as it was"
    shutil.rmtree(store.merged)
    assert served(scene.mapped(RecoveryPoint(0, None, 0))) == scene.at(0)


def test_one_of_other_intervals_is_not_taken_for_its_own(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """It is whole, and of the same last interval."""
    store = scene.world.store
    merge(store, Span(1, 32))
    file = store.merged / "0000000017-0000000032"
    (store.merged / "0000000001-0000000032").rename(file)
    assert served(scene.mapped(RecoveryPoint(48, None, 0))) == scene.at(48)
    assert f"{file} is not of the intervals in its name" in caplog.text
    assert not file.exists()
