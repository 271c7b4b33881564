"""Recovery points of every kind, of one volume and of three: the view is the image, and stays it (truth 6).

One volume is a real cluster with its agent. Three are two mounted filesystems and a raw volume with the checkpoints,
which the test's own stages follow.
"""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from pgcdp import api
from pgcdp.records import RecoveryPoint, Span, Target
from pgcdp.recovery import restore
from pgcdp.recovery.merged import known, merge_due
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import shown
from pgcdp.store.image import read_state
from pgcdp.store.open_interval import read_open_last
from tests.beside import repeated
from tests.fix_engine import MIB, MakeCapture
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet, assert_equal, cutting
from tests.load import ALLOWED, Load
from tests.mounted_files import FileUser, mounted_filesystem
from tests.results import keep_result
from tests.stage_history import History, source_of
from tests.waiting import wait_until
from tests.watched import Watched, images_at

KINDS = ("first interval", "old", "newest interval", "open interval", "journal", "boundary", "first of an interval")
LATER = 5
"""Intervals that the image moves on under each view."""
SETTINGS = {"min_wal_size": "32MB", "max_wal_size": "48MB", "shared_buffers": "32MB", "max_prepared_transactions": "10"}
NOISE = [*ALLOWED, r"checkpoints are occurring too frequently"]
VERSIONS = {"ext4": 15, "xfs": 17}
SIZES = {"ext4": 64 * MIB, "xfs": 304 * MIB}
CLUSTER_SIZES = {"ext4": 224 * MIB, "xfs": 304 * MIB}


class Scene(Protocol):
    """A history that goes on by itself."""

    kinds: tuple[str, ...]

    def source(self) -> Source:
        """Store and journal as they are now."""

    def target(self, kind: str, source: Source, rng: random.Random) -> Target | None:
        """One of that kind; None when there is none at this moment."""

    def restore(self, target: Target, point: RecoveryPoint, source: Source, place: Path) -> None:
        """The image of a point, made at `place`."""


def target_of(kind: str, source: Source, rng: random.Random) -> Target | None:
    """One of the KINDS."""
    intervals = source.intervals()
    last = intervals[-1]
    if kind == "boundary":
        return Target("boundary", rng.randrange(len(intervals) + 1))
    if kind == "first of an interval":
        return Target("write", rng.choice(intervals).from_write)
    published = {"first interval": intervals[0], "old": rng.choice(intervals[:-1]), "newest interval": last}
    if kind in published:
        return Target("write", rng.randint(published[kind].from_write, published[kind].to_write))
    try:
        entry = read_open_last(source.store, last.number + 1)
    except FileNotFoundError:  # published just now
        return None
    assert source.durable_write is not None
    taken = last.to_write if entry is None else min(int(entry["number"]), source.durable_write)
    first, end = (last.to_write + 1, taken) if kind == "open interval" else (taken + 1, source.durable_write)
    return Target("write", rng.randint(first, end)) if first <= end else None


@dataclass
class Shown:
    """An open view: what it shows, how long it took to open, and where the store was then."""

    kind: str
    point: RecoveryPoint
    view: Watched
    seconds: float
    source: Source
    boundary: int
    spans: set[Span]

    def moved(self) -> int:
        return read_state(self.source.store).boundary - self.boundary

    def merged(self) -> int:
        """Increments that were merged since."""
        return len(known(self.source.store) - self.spans)

    def judge(self) -> dict[str, Any]:
        """Compare it once more."""
        moved, merged = self.moved(), self.merged()
        self.view.assert_unchanged()
        status = self.view.status()
        assert status["error_count"] == 0
        assert self.view.reads > 0
        return {
            "kind": self.kind, "write": self.point.write, "interval": self.point.interval,
            "blanked": self.point.blank_write is not None, "boundary_of_image": self.boundary,
            "seconds_to_open": round(self.seconds, 4), "intervals_later": moved, "merged_later": merged,
            "reloads": status["reloads"], "reads": self.view.reads,
        }  # fmt: skip


@contextmanager
def opened(scene: Scene, kind: str, place: Path, rng: random.Random) -> Iterator[Shown]:
    """A view of a point of that kind, found equal to its image."""
    place.mkdir()

    def choose() -> tuple[Source, Target] | None:
        source = scene.source()
        target = scene.target(kind, source, rng)
        return (source, target) if target is not None else None

    found = wait_until(choose, what=f"a point: {kind}")
    assert found is not None
    source, target = found
    point = source.resolve(target)
    begun = time.monotonic()
    with shown(source, point, place) as files:
        seconds = time.monotonic() - begun
        boundary, spans = read_state(source.store).boundary, known(source.store)
        image = place.with_name(f"{place.name}-image")
        scene.restore(target, point, source, image)
        images = images_at(image, source)
        assert_equal(files, images, f"{kind}, {point}, just opened")
        view = Watched(files, images, point.write, pause=0.2)
        try:
            yield Shown(kind, point, view, seconds, source, boundary, spans)
        finally:
            view.end()
    restore.remove(image)
    shutil.rmtree(place)


def show_points(scene: Scene, place: Path, points: int, at_once: int, rng: random.Random) -> list[dict[str, Any]]:
    """So many points, `at_once` of them open beside each other until the image has moved and increments were merged."""
    kinds = [scene.kinds[number % len(scene.kinds)] for number in range(points)]
    rng.shuffle(kinds)
    rows = []
    for begin in range(0, points, at_once):
        with ExitStack() as stack:
            views = [
                stack.enter_context(opened(scene, kind, place / f"view{begin + number}", rng))
                for number, kind in enumerate(kinds[begin : begin + at_once])
            ]

            def ready(views: list[Shown] = views) -> bool:
                wrong = any(shown.view.wrong for shown in views)
                return wrong or all(shown.moved() >= LATER and shown.merged() for shown in views)

            wait_until(ready, timeout=240, interval=0.1, what="later intervals and a merge under each view")
            rows += [shown.judge() for shown in views]
    return rows


def run_points(scene: Scene, place: Path, history: int, points: int, at_once: int, seed: int) -> dict[str, Any]:
    """What was found about `points` views of a history that had `history` intervals when the first was opened."""
    place.mkdir()
    wait_until(lambda: len(scene.source().intervals()) >= history, timeout=600, what=f"{history} intervals")
    rows = show_points(scene, place, points, at_once, random.Random(seed))
    source = scene.source()
    seconds = [row["seconds_to_open"] for row in rows]
    return {
        "points": len(rows),
        "kinds": dict(Counter(row["kind"] for row in rows)),
        "blanked": sum(row["blanked"] for row in rows),
        "intervals_before": history,
        "intervals": len(source.intervals()),
        "merged": len(known(source.store)),
        "least_intervals_later": min(row["intervals_later"] for row in rows),
        "least_merged_later": min(row["merged_later"] for row in rows),
        "reloads": sum(row["reloads"] for row in rows),
        "seconds_to_open": {"median": statistics.median(seconds), "max": max(seconds)},
        "rows": rows,
    }


class Cluster:
    """One volume: a protected cluster."""

    kinds: tuple[str, ...] = (*KINDS, "exclusive of a transaction")

    def __init__(self, found: ProtectedSet, load: Load) -> None:
        self.found = found
        self.load = load

    def source(self) -> Source:
        return self.found.source()

    def target(self, kind: str, source: Source, rng: random.Random) -> Target | None:
        if kind in KINDS:
            return target_of(kind, source, rng)
        return Target("xid", rng.choice(self.load.acks()).xid, exclusive=True)

    def restore(self, target: Target, point: RecoveryPoint, source: Source, place: Path) -> None:
        api.restore(self.found.name, target, to_image=place)


@contextmanager
def cluster(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> Iterator[tuple[Cluster, Path]]:
    """A cluster under load that is cut all the time; where views may lie."""
    found = make_set(binaries_of(VERSIONS[fs]), fs=fs, size=CLUSTER_SIZES[fs], settings=SETTINGS, allowed=NOISE)
    # Little: a restore reads back each interval between its point and the image.
    load = Load(
        found.address(), found.binaries, postgres_user(), clients=1, ledgers=1, scale=1, rate=30, churn_pause=1.0
    )
    load.prepare()
    load.start()
    load.wait_for(50)
    try:
        with cutting(found):
            yield Cluster(found, load), found.root / "views"
    finally:
        result = load.stop()
    assert not result.failures


class Volumes:
    """Three volumes: the history of a capture."""

    kinds: tuple[str, ...] = KINDS

    def __init__(self, history: History) -> None:
        self.history = history

    def source(self) -> Source:
        return source_of(self.history)

    def target(self, kind: str, source: Source, rng: random.Random) -> Target | None:
        return target_of(kind, source, rng)

    def restore(self, target: Target, point: RecoveryPoint, source: Source, place: Path) -> None:
        restore.to_image(source, point, place)

    def interval(self) -> None:
        """What the agent does at a boundary, and what it does beside that."""
        self.history.run(1, 10)
        merge_due(self.history.store)


@contextmanager
def volumes(make_capture: MakeCapture, scratch: Path, fs: str, pause: float) -> Iterator[tuple[Volumes, Path]]:
    """Three volumes in use that are cut all the time, `pause` seconds apart; where views may lie."""
    sizes = {"first": SIZES[fs], "second": SIZES[fs], "control": 4 * MIB}
    capture = make_capture(sizes, journal_limit=16 << 30)
    capture.start()
    with ExitStack() as stack:
        places = [
            stack.enter_context(mounted_filesystem(capture.device(name), fs, scratch / name))
            for name in ("first", "second")
        ]
        history = History(capture, len(fs), "optimal" if fs == "ext4" else "replay", raw=["control"], pause=0.02)
        stack.callback(history.stages.close)
        users: list[Callable[[], None]] = [
            FileUser(place / f"{number}", number).step for place in places for number in range(2)
        ]
        stack.enter_context(repeated(*users, pause=0.05))
        history.work.start()
        stack.callback(history.work.finish)
        history.baseline()
        found = Volumes(history)
        with repeated(found.interval, pause=pause):
            yield found, scratch / "views"


def assert_shown(found: dict[str, Any], points: int) -> None:
    assert found["points"] == points
    assert found["least_intervals_later"] >= LATER
    assert found["least_merged_later"] >= 1
    assert found["reloads"] > 0


@pytest.mark.timeout(900)
def test_seven_points_of_three_volumes(make_capture: MakeCapture, scratch: Path) -> None:
    with volumes(make_capture, scratch, "ext4", pause=0.02) as (scene, place):
        assert_shown(run_points(scene, place, history=18, points=7, at_once=7, seed=1), 7)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_many_points_of_a_cluster(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    with cluster(make_set, binaries_of, fs) as (scene, place):
        found = run_points(scene, place, history=41, points=75, at_once=15, seed=len(fs))
    keep_result(f"view-points-{fs}-1-volumes", found)
    assert_shown(found, 75)
    assert found["blanked"] > 0


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_many_points_of_three_volumes(make_capture: MakeCapture, scratch: Path, fs: str) -> None:
    with volumes(make_capture, scratch, fs, pause=0.3) as (scene, place):
        found = run_points(scene, place, history=41, points=75, at_once=15, seed=len(fs))
    keep_result(f"view-points-{fs}-3-volumes", found)
    assert_shown(found, 75)
