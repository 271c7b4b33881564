"""Retention against the dumb model: what should remain is what the last write left, what went is refused.

Random histories and policies; killed at every step; with open views of which the files stay.
"""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcdp.errors import TargetError
from pgcdp.intervals.increments import close_interval
from pgcdp.records import Span, Target
from pgcdp.recovery import merged
from pgcdp.recovery.choosing import holding_of, pins_of
from pgcdp.recovery.expiring import Done
from pgcdp.recovery.sweeping import waiting_bytes
from pgcdp.recovery.view import make_map
from pgcdp.store.bundle import Bundle
from pgcdp.store.history import add_history
from pgcdp.store.image import Image
from pgcdp.store.image_lock import image_held
from pgcdp.store.kept import keep_event
from pgcdp.store.layout import Store
from pgcdp.store.published import published
from pgcdp.store.rebuild import rebuild
from pgcdp.store.retention import Policy, plan
from pgcdp.store.scrub import check_store
from tests.dying import dying_after
from tests.fix_years import AN_HOUR, HOURLY, MINUTE_NS, NOW, Years, files_of
from tests.unit.test_blockmap import materialized, served
from tests.unit.test_increments import fill
from tests.unit.test_retention import carried_out, points

periods = st.one_of(st.none(), st.integers(0, 3 * 86400).map(float))
policies = st.builds(Policy, periods, periods, periods, periods)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    policy=policies,
    kept=st.lists(st.integers(0, 100), max_size=2),
    verified=st.one_of(st.none(), st.integers(0, 14)),
    behind=st.integers(0, 6),
    moving=st.booleans(),
)
def test_what_should_remain_is_what_the_last_write_left(
    seed: int, sizes: list[int], policy: Policy, kept: list[int], verified: int | None, behind: int, moving: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    place = tmp_path_factory.mktemp("years")
    chooser = random.Random(seed)
    minutes = [chooser.choice([1, 5, 30, 300, 1500]) for _ in sizes]
    years = Years(place, seed, sizes, minutes, behind + 1)
    store = years.store
    for write in kept:
        add_history(store, "event", write, keep_event("kept", write, True))
    if verified is not None:
        point = {"write": 0, "boundary": verified, "lsn": None}
        add_history(store, "verification", 1, {"ok": True, "recovery_point": point, "interval": verified})
    if moving:
        years.time_ns += MINUTE_NS
        opened = fill(years.world, years.count + 1, len(years.world.ops))
        image = Image.open(store, writable=True)
        bundle = close_interval(store, opened, image, years.end_of(years.count + 1), {})
        image.close()
        years.move_in_part(bundle)
        years.capture(2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merged, "FANOUT", 2)
        if chooser.random() < 0.5:
            merged.merge_due(store)
        if chooser.random() < 0.5:
            rebuild(store)[0].close()
        for again in (policy, replace(policy, boundaries=0.0, hourly=0.0)):
            holding = holding_of(store)
            assert holding is not None
            wanted = carried_out(holding, plan(holding, again, pins_of(store, holding), NOW))
            done = years.expire(again)
            assert not done.failed
            assert not done.waiting
            assert holding_of(store) == replace(wanted, intervals=(holding_of(store) or wanted).intervals)
            last = holding.boundaries()[-1].write
            years.assert_only(points(wanted) | set(range(last, len(years.world.ops) + 1)))
            assert years.expire(again) == Done(), "nothing is left to be done"
            assert not waiting_bytes(store)
        merged.merge_due(store)
        assert not merged.stale(store, merged.known(store))
        years.assert_only(points(wanted) | set(range(last, len(years.world.ops) + 1)))
    years.assert_sound()
    shutil.rmtree(place)


# --- killed


def kill_at_every_step(years: Years, policy: Policy, stride: int) -> int:
    """Killed at each `stride`th change to the disk, and taken up again; how many times."""
    store, place = years.store, years.place
    holding = holding_of(store)
    assert holding is not None
    found = plan(holding, policy, pins_of(store, holding), NOW)
    assert found
    remains = points(carried_out(holding, found)) | {len(years.world.ops)}
    rebuild(store)[0].close()
    before = place / "before"
    shutil.copytree(store.path, before, symlinks=True)
    years.expire(policy)
    years.assert_only(remains)
    wanted = files_of(store)
    kills = 0
    for changes in range(years.chooser.randrange(stride), 100_000, stride):
        shutil.rmtree(store.path)
        shutil.copytree(before, store.path, symlinks=True)
        with dying_after(changes) as fate:
            years.run(policy)
        if not fate.dead:
            break
        kills += 1
        assert check_store(store).ok, f"killed after {changes} changes"
        as_stored = {span.last: Bundle.at(store, span).interval for span in store.spans()}
        assert {number: each.interval for number, each in published(store).items()} == as_stored, (
            "the catalog is behind"
        )
        for write in sorted(remains):
            source = years.source()
            view = years.mapped(source.resolve(Target("write", write)))
            assert served(view) == years.at(write), f"write {write}, killed after {changes} changes"
        if kills % 2:
            rebuild(store)[0].close()  # else the catalog is what the kill left
        years.expire(policy)
        years.assert_only(remains)
        assert files_of(store) == wanted, f"killed after {changes} changes"
    return kills


def test_thinning_killed_at_every_step(tmp_path: Path) -> None:
    years = Years(tmp_path, 5, [4, 3, 5, 2], [30] * 4)
    assert kill_at_every_step(years, Policy(0.0), 1) > 30


def test_joining_killed_at_every_step(tmp_path: Path) -> None:
    years = Years(tmp_path, 6, [4, 3, 5, 2, 3, 2], AN_HOUR)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merged, "FANOUT", 2)
        merged.merge_due(years.store)
        assert kill_at_every_step(years, HOURLY, 1) > 30


def test_moving_the_base_killed_at_every_step(tmp_path: Path) -> None:
    years = Years(tmp_path, 7, [4, 3, 5, 2], [1500] * 4)
    assert kill_at_every_step(years, Policy(0.0, 0.0, 0.0, 0.0), 1) > 10


def test_all_of_it_killed_again_and_again(tmp_path: Path) -> None:
    """Each run is killed a little later than the one before, on what that one left."""
    years = Years(tmp_path, 8, [3] * 12, [5, 5, 5, 60, 5, 1500, 5, 5, 60, 5, 5, 5])
    store = years.store
    policy = Policy(0.0, 3600.0, 86400.0, 2 * 86400.0)
    holding = holding_of(store)
    assert holding is not None
    remains = points(carried_out(holding, plan(holding, policy, pins_of(store, holding), NOW)))
    for changes in range(400):
        with dying_after(changes) as fate:
            years.run(policy)
        source = years.source()
        for write in years.chooser.sample(sorted(remains), 3):
            assert served(years.mapped(source.resolve(Target("write", write)))) == years.at(write)
        if not fate.dead:
            break
    assert not fate.dead
    years.assert_only(remains)
    years.assert_sound()


# --- what is in the way


def test_nothing_goes_while_a_reader_holds_the_image(tmp_path: Path) -> None:
    """A restore looks at the store again and again: what it began with must be there until its end."""
    years = Years(tmp_path, 9, [4] * 6, AN_HOUR)
    before = files_of(years.store)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with image_held(years.store):
        done = years.expire(HOURLY, stop=stop)
    assert (done.joins, done.thin, done.base) == ([], [], None)
    assert files_of(years.store) == before
    assert years.expire(HOURLY).joins == [Span(1, 5)]


def test_what_was_let_go_of_under_a_listing_is_refused_not_guessed(tmp_path: Path) -> None:
    """Resolved before, opened behind: the target is gone by then."""
    years = Years(tmp_path, 10, [6] * 4, [30] * 4)
    source = years.source()
    point = source.resolve(Target("write", 9))
    assert years.expire(Policy(0.0)).thin == [1, 2, 3]
    place = tmp_path / "late"
    place.mkdir()
    with source.held(), pytest.raises(TargetError, match=r"retention let go|only the boundaries"):
        make_map(source, point, place)
    with source.held(), pytest.raises(TargetError):
        materialized(source, point, tmp_path)


def test_damage_is_left_as_it_is_and_said(tmp_path: Path) -> None:
    """Thinning or joining it would lose what the damage has spared."""
    years = Years(tmp_path, 11, [6] * 6, [30] * 6)
    file = years.store.interval(2) / "writes"
    raw = bytearray(file.read_bytes())
    for at in range(64, len(raw), 64):
        raw[at] ^= 1
    file.write_bytes(raw)
    done = years.expire(Policy(0.0))
    assert done.thin == [1, 3, 4, 5]
    (said,) = done.failed
    assert str(file) in said
    assert Bundle.open(years.store, 2).interval.restorable_by_write
    assert not (years.store.interval(2) / "forward").exists()
    done = years.expire(HOURLY)
    assert done.failed
    assert file.read_bytes() == bytes(raw)


def test_a_store_that_is_full_is_left_as_it_is(tmp_path: Path) -> None:
    years = Years(tmp_path, 12, [6] * 4, [30] * 4)
    before = files_of(years.store)
    with pytest.MonkeyPatch.context() as patched:

        def full(fd: int, data: Any, offset: int) -> int:
            raise OSError(28, "No space left on device")

        patched.setattr(os, "pwrite", full)
        done = years.expire(Policy(0.0))
    assert len(done.failed) == 1, "it is said once"
    assert files_of(years.store) == before
    assert years.expire(Policy(0.0)).thin == [1, 2, 3]


def test_room_is_made_when_too_little_is_free(tmp_path: Path) -> None:
    """Single writes of the oldest first, then the oldest; the newest interval and the verified boundary stay."""
    years = Years(tmp_path, 13, [8] * 10, [30] * 10)
    point = {"write": 0, "boundary": 7, "lsn": None}
    add_history(years.store, "verification", 1, {"ok": True, "recovery_point": point})
    start = sum(files_of(years.store).values())

    def free(store: Store) -> int:
        return start - sum(files_of(store).values())

    done = years.expire(Policy(least_free=1), free=free)
    assert done.thin
    assert done.thin == list(range(1, len(done.thin) + 1))
    assert (done.base, done.failed) == (None, [])
    done = years.expire(Policy(least_free=1 << 40), free=free)
    assert done.base == 7
    assert "nothing else may be let go of" in done.failed[-1]
    years.assert_only({57, 65, *range(73, 82)})
    years.assert_sound()
