"""A history of years in a small store, for retention: its intervals end minutes, hours or days after each other."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pgcdp.errors import TargetError
from pgcdp.fsio import read_json, write_json
from pgcdp.intervals.applying import apply_backward, apply_forward
from pgcdp.intervals.increments import close_interval, move_image
from pgcdp.records import BLOCK, WAL_WRITE, Boundary, Position, RecoveryPoint, Target
from pgcdp.recovery.expiring import Done, Run, expiring
from pgcdp.recovery.source import Source
from pgcdp.store.bundle import EVENTS, Bundle
from pgcdp.store.image import Image
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval
from pgcdp.store.published import published
from pgcdp.store.rebuild import rebuild
from pgcdp.store.retention import DAY_NS, Plan, Policy
from pgcdp.store.scrub import check_store
from pgcdp.store.transactions import SCHEMA, write_transactions, write_wal
from tests.journal_writer import MARK, Op
from tests.unit.test_blockmap import Scene, materialized, served
from tests.unit.test_increments import applied, capture, make_world, random_op
from tests.unit.test_retention import START_NS

MINUTE_NS = 60 * 10**9
NOW = START_NS + 400 * DAY_NS
EVERYTHING_OLD = Policy(0.0, 0.0, 0.0, None)
"""Only the newest boundary of each day stays."""
HOURLY = Policy(0.0, 0.0, None)
AN_HOUR = [90, 5, 5, 5, 5, 120]
"""Minutes between boundaries: all but the last one are joined to an hour."""
DROP_ALL = Policy(0.0, 0.0, 0.0, 0.0)


class Years(Scene):
    """A history whose intervals end so many minutes after each other; the image is at the newest."""

    def __init__(self, place: Path, seed: int, sizes: list[int], minutes: list[int], behind: int = 0) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        self.chooser = random.Random(seed)
        self.world = make_world(place)
        self.time_ns = START_NS
        self.position: Position | None = None
        capture(self.world, [Op(MARK, data=b"the baseline ends")], self.chooser)
        self.done = 1
        image = Image.open(self.world.store, writable=True)
        image.set_at(0, 1)
        image.close()
        self.world.store = self.world.store.with_baseline(self.end_of(0))
        for number, (size, after) in enumerate(zip(sizes, minutes, strict=True), 1):
            self.time_ns += after * MINUTE_NS
            capture(self.world, [random_op(self.chooser) for _ in range(size)], self.chooser)
            self.publish_at(number)
        self.count = len(sizes)
        self.capture(behind)

    def end_of(self, number: int) -> Boundary:
        return Boundary(number, len(self.world.ops), self.time_ns, 100 + number, 90 + number, 1, 700, "period")

    def publish_at(self, number: int) -> Bundle:
        opened = OpenInterval.open(self.store, number, self.done + 1)
        opened._writes._frame_bytes = self.chooser.choice([BLOCK, 20 * BLOCK])
        for run in self.world.journal.batches(self.done, len(self.world.ops), self.position):
            opened.append(run)
            self.position = run.end
        self.done = opened.last_write
        self.before_end(opened)
        image = Image.open(self.world.store, writable=True)
        bundle = close_interval(self.world.store, opened, image, self.end_of(number), {"number": number})
        move_image(image, bundle)
        image.close()
        return bundle

    def before_end(self, opened: OpenInterval) -> None:
        """An interval is about to be closed."""

    @property
    def store(self) -> Store:
        return self.world.store

    def expire(self, policy: Policy, **more: Any) -> Done:
        with expiring(self.store):
            return self.run(policy, **more)

    def run(self, policy: Policy, **more: Any) -> Done:
        """Without the lock, which a kill lets go of: here it is the same process that goes on."""
        return Run(self.store, policy, **more).run(NOW)

    def assert_only(self, remains: set[int]) -> None:
        """These points restore right, both ways; all others are refused with points that exist."""
        source = self.source()
        listing = source.listing()
        newest = len(self.world.ops)
        assert remains >= {newest}
        for write in range(1, newest + 1):
            if write not in remains:
                with pytest.raises(TargetError) as told:
                    source.resolve(Target("write", write))
                self.assert_hint_is_true(source, told.value)
                continue
            view = self.mapped(source.resolve(Target("write", write)))
            assert served(view) == self.at(write), f"write {write}"
        for boundary in (listing.base, *(each.boundary for each in listing.intervals)):
            point = source.resolve(Target("boundary", boundary.number))
            with source.held():
                assert materialized(source, point, self.place) == self.at(boundary.write)
            assert source.settings(point), "a sandbox needs them"
        write = self.chooser.choice(sorted(remains))
        with source.held():
            assert materialized(source, RecoveryPoint(write, None, 0), self.place) == self.at(write)

    def assert_restores(self, targets: Sequence[Target]) -> None:
        """Each of them, byte for byte."""
        for target in targets:
            source = self.source()
            point = source.resolve(target)
            with source.held():
                assert materialized(source, point, self.place) == self.at(point.write), target
            assert served(self.mapped(point)) == self.at(point.write), target

    def assert_hint_is_true(self, source: Source, error: TargetError) -> None:
        words = (error.hint or "").split()
        named = [int(words[at + 1]) for at, word in enumerate(words) if word == "--target-boundary"]
        if "between" in error.message:
            assert len(named) == 2
        for number in named:
            assert source.resolve(Target("boundary", number)).boundary == number

    def assert_sound(self) -> None:
        """Everything that is stored is whole, and tells the same with a catalog and without."""
        report = check_store(self.store)
        assert report.ok, report.damages
        listed = list(published(self.store).values())
        catalog, damages = rebuild(self.store)
        catalog.close()
        assert not damages
        assert list(published(self.store).values()) == listed
        for each in listed:
            bundle = Bundle.at(self.store, each.interval.span)
            bundle.check()
            first, last = each.interval.from_write - 1, each.interval.to_write
            assert applied(self.place, self.at(last), apply_backward, bundle) == self.at(first)
            assert applied(self.place, self.at(first), apply_forward, bundle) == self.at(last), "R2"


def files_of(store: Store) -> dict[str, int]:
    """All files that a store should have, with their sizes: without catalog and locks."""
    found = {}
    for path in sorted(store.path.rglob("*")):
        if path.is_file() and not path.name.endswith("lock"):
            found[os.fspath(path.relative_to(store.path))] = path.stat().st_size
    return found


def index(store: Store, number: int) -> None:
    """Say of an interval that no transactions ended in it."""
    place = store.interval(number)
    manifest = read_json(place / "manifest.json")
    made = [write_transactions(place, SCHEMA.empty_table()), write_wal(place, np.zeros(3, dtype=WAL_WRITE))]
    write_json(place / EVENTS, {"events": [], "tables": []})
    entries = {each.name: {"bytes": each.bytes, "checksum": each.checksum, "length": each.length} for each in made}
    raw = (place / EVENTS).read_bytes()
    entries[EVENTS] = {"bytes": len(raw), "checksum": xxhash.xxh3_64_hexdigest(raw), "length": len(raw)}
    manifest["files"] |= entries
    manifest["transactions"] = {"marks": 0, "lost": 0, "count": 0, "wal_to": 0}
    write_json(place / "manifest.json", manifest)


def carry_out(years: Years, plan: Plan) -> None:
    with expiring(years.store):
        assert not Run(years.store, Policy()).carry_out(plan).failed


@pytest.fixture
def years(tmp_path: Path) -> Years:
    return Years(tmp_path, 51, [6] * 6, [30] * 6)


@pytest.fixture
def hour(tmp_path: Path) -> Years:
    """The first five of six intervals are joined by HOURLY."""
    return Years(tmp_path, 52, [6] * 6, AN_HOUR)


@pytest.fixture
def based(tmp_path: Path) -> Years:
    """A store whose oldest boundary is a later one, of 4 of 6 intervals."""
    years = Years(tmp_path, 53, [6] * 6, [30] * 6)
    carry_out(years, Plan(base=4))
    return years
