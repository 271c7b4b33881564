"""The image moves under open views, and none of them ever shows a byte of it (truth 6)."""

from __future__ import annotations

import fcntl
import os
import random
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pgcdp.capture.control import EngineClient
from pgcdp.capture.journal import Journal
from pgcdp.errors import PgcdpError
from pgcdp.intervals.increments import Mode
from pgcdp.records import BLOCK, RecoveryPoint, Target
from pgcdp.recovery.make_way import MakeWay
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import moved_on, shown
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import read_state
from pgcdp.store.image_lock import image_held, image_to_move
from pgcdp.store.layout import Store
from pgcdp.store.open_views import registered
from tests.crash.test_killed_agent import KILLED, followed
from tests.engine.test_reload import image_at, map_of
from tests.fix_engine import Direct, MakeCapture
from tests.fix_views import ShowMap, ShownView, waits_for_fuse
from tests.stage_history import VOLUMES, History, source_of
from tests.stopping import stop
from tests.unit.test_blockmap import Scene, materialized
from tests.unit.test_increments import BLOCKS
from tests.waiting import wait_until
from tests.watched import Watched, watched

PAUSE = 0.01
"""Seconds between two writes of a writer: else, while something is slow, each block is written before a move comes, and
a view needs nothing of the image any more."""


@pytest.fixture
def history(make_capture: MakeCapture) -> Iterator[Callable[[int, Mode], History]]:
    made: list[History] = []

    def make(seed: int, mode: Mode) -> History:
        capture = make_capture(VOLUMES, journal_limit=4 << 30)
        capture.start()
        found = History(capture, seed, mode, pause=PAUSE)
        made.append(found)
        found.work.start()
        found.work.wait_answered(50)
        found.baseline()
        found.run(3)
        return found

    yield make
    for found in made:
        found.work.finish()
        found.stages.close()


def moved(history: History, boundary: int) -> bool:
    """Whether the image is beyond a boundary; it is moved if no view keeps it."""
    history.stages.move()
    return read_state(history.store).boundary > boundary


@pytest.mark.parametrize("mode", ["optimal", "replay"])
def test_views_do_not_change_while_the_image_moves(
    history: Callable[[int, Mode], History], scratch: Path, mode: Mode
) -> None:
    """Four views, at a boundary, in an interval, in the open one and in the journal, are read during eight moves."""
    found = history(31, mode)
    rng = random.Random(mode)
    source = source_of(found)
    base, newest = source.base().write, source.durable_write
    assert newest is not None
    first = source.intervals()[0]
    points = [first.to_write, rng.randrange(base, first.to_write), found.store_boundary() + 1, newest]
    with ExitStack() as stack:
        views = []
        for number, write in enumerate(points):
            point = source.resolve(Target("write", write))
            views.append(stack.enter_context(watched(source, point, scratch / f"view{number}", number)))
        reloads = [0] * len(views)
        for _ in range(8):
            begun = [view.reads for view in views]
            boundary = found.stages.image.state.boundary
            maps = [view.map() for view in views]
            found.run(1, 200)
            wait_until(partial(moved, found, boundary), what="the image moves under open views")
            assert found.stages.image.state.boundary == boundary + 1
            bundle = Bundle.open(found.store, boundary + 1)
            for number, shown_map in enumerate(maps):  # on a fast machine few blocks are left that a view has of it
                reloads[number] += moved_on(shown_map, bundle) is not None
            assert all(view.wrong == [] for view in views), [view.wrong for view in views]
            for view, before in zip(views, begun, strict=True):
                view.wait_reads(before + 4)
        for view, times in zip(views, reloads, strict=True):
            view.assert_unchanged()
            status = view.status()
            assert status["error_count"] == 0
            assert status["reloads"] == times > 0
        assert len(list((found.store.image / "views").iterdir())) == 4
        again = source_of(found)
        for write, view in zip(points, views, strict=True):
            with again.held():
                assert materialized(again, again.resolve(Target("write", write)), scratch) == view.wanted()
    assert list((found.store.image / "views").iterdir()) == []


FENCE_SECONDS = 10.0
"""Longer than two intervals take: each look of theirs at the silent view waits a second for it."""


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def test_a_silent_view_is_fenced_and_the_image_waits_until_it_is_gone(
    history: Callable[[int, Mode], History], scratch: Path
) -> None:
    """Another view, which answers, goes on; and the journal is taken all the while."""
    found = history(32, "optimal")
    said: list[str] = []
    found.stages.make_way = MakeWay(FENCE_SECONDS, said.append)
    source = source_of(found)
    with watched(source, source.resolve(Target("boundary", 1)), scratch / "good") as good:
        (scratch / "silent").mkdir()
        silent = shown(source, source.resolve(Target("boundary", 2)), scratch / "silent")
        files = silent.__enter__()
        pid = int(EngineClient(scratch / "silent" / "control").request("status")["pid"])
        ended = os.pidfd_open(pid)
        boundary = read_state(found.store).boundary
        stop(pid)
        found.run(2)
        state = read_state(found.store)
        assert (state.state, state.boundary) == ("at", boundary), "the image moved under a view that had not answered"
        assert not has_ended(ended), "it has its time"
        assert found.store.interval_numbers()[-1] == boundary + 1
        assert found.stages.opened is not None
        assert found.stages.opened.last_write > found.store_boundary(), "writes are taken while the image waits"
        assert str(scratch / "silent") in said[-1]
        assert str(scratch / "good") not in said[-1]

        def moved_behind_its_end() -> bool:
            found.follow()
            found.stages.move()
            now = read_state(found.store)
            assert (now.state, now.boundary) == ("at", boundary) or has_ended(ended), "it moved before the end"
            return now.boundary > boundary

        wait_until(moved_behind_its_end, timeout=60, what="the image moves")
        assert has_ended(ended)
        os.close(ended)
        assert said[-1] == ""
        with pytest.raises(OSError, match=r"not connected|Input/output|abort"), Direct(files[0]) as device:
            device.read(0, BLOCK)
        fenced = rf"the view of write \d+ was fenced: in {FENCE_SECONDS:g} s it did not learn"
        with pytest.raises(PgcdpError, match=fenced) as raised:
            silent.__exit__(None, None, None)
        assert raised.value.exit_code == 1
        assert "fence_after" in str(raised.value.hint)
        assert "did not answer" in raised.value.message
        good.assert_unchanged()
        assert good.status()["reloads"] == 1
        found.run(1)
        good.assert_unchanged()


def test_a_view_whose_map_is_damaged_is_fenced(history: Callable[[int, Mode], History], scratch: Path) -> None:
    found = history(33, "optimal")
    found.stages.make_way = MakeWay(1.0)
    source = source_of(found)
    view = shown(source, source.resolve(Target("boundary", 1)), scratch)
    view.__enter__()
    raw = bytearray((scratch / "map").read_bytes())
    raw[len(raw) // 2] ^= 1
    (scratch / "map").write_bytes(raw)
    boundary = read_state(found.store).boundary
    found.run(1)
    wait_until(partial(moved, found, boundary), what="the image moves")
    with pytest.raises(PgcdpError, match=f"was fenced.*{scratch / 'map'} has a wrong header or checksum"):
        view.__exit__(None, None, None)


def test_a_question_that_comes_too_late_changes_nothing(history: Callable[[int, Mode], History], scratch: Path) -> None:
    """The image has moved since it was asked, and the view was made for the image as it is now."""
    found = history(35, "optimal")
    source = source_of(found)
    newest = found.store.interval_numbers()[-1]
    with watched(source, source.resolve(Target("boundary", newest)), scratch / "view") as view:
        make_way, bundle = MakeWay(10.0), Bundle.open(found.store, newest)
        wait_until(lambda: make_way(found.store, bundle), what="that the view answers")
        view.assert_unchanged()
        assert view.status()["reloads"] == 0


def image_through_views(show_map: ShowMap, scene: Scene, below: Path) -> int:
    """The image's first volume now comes from a view, and that one's from another: the process id of the last.

    While that is stopped, a read of the image ends neither by itself nor with its reader's death.
    """
    image = scene.world.store.image / "data.img"
    (below / "middle").mkdir(parents=True)
    image_at(below / "data", image.read_bytes())
    last = show_map(map_of(below / "data", blocks=BLOCKS))
    (below / "middle" / "data.img").symlink_to(last.device("data"))
    (below / "middle" / "data.sums").symlink_to(below / "data.sums")
    middle = show_map(map_of(below / "middle" / "data", blocks=BLOCKS))
    image.unlink()
    image.symlink_to(middle.device("data"))
    return int(last.status()["pid"])


@contextmanager
def stuck_in_a_read(show_map: ShowMap, scratch: Path, seed: int) -> Iterator[tuple[Scene, Bundle, ShownView]]:
    """A registered view that is in a read of the image's blocks which interval 3 changes, inside of the context."""
    scene = Scene(scratch / "scene", seed, [10, 10], 0, 0)
    view_map = scene.mapped(RecoveryPoint(len(scene.world.ops), None, 0))
    scene.capture(12)
    bundle = scene.publish(3)
    last = image_through_views(show_map, scene, scratch / "below")
    view = show_map(view_map, start=False)
    with image_held(scene.world.store), registered(scene.world.store, view.client.control, 20) as known:
        view.inherited = known.descriptor
        view.start()
    pid = int(view.status()["pid"])

    def read() -> None:
        with suppress(OSError), Direct(view.device("data")) as volume:
            volume.read(0, BLOCKS * BLOCK)

    reader = threading.Thread(target=read)
    stop(last)
    try:
        reader.start()
        wait_until(lambda: waits_for_fuse(pid), what="a read of the image under way")
        yield scene, bundle, view
    finally:
        os.kill(last, signal.SIGCONT)
        reader.join()


def test_the_image_waits_for_a_killed_engine_that_has_not_ended(show_map: ShowMap, scratch: Path) -> None:
    """Its read of the image is under way in the kernel, where no signal ends it."""
    make_way = MakeWay(1.0)
    with stuck_in_a_read(show_map, scratch, 41) as (scene, bundle, view):
        pid = int(view.status()["pid"])
        answers = [make_way(scene.world.store, bundle) for _ in range(5)]
        assert (view.root / "fenced").exists()
        assert answers == [False] * 5, "way was made while the engine still reads the image"
        assert Path(f"/proc/{pid}").exists()
    wait_until(lambda: make_way(scene.world.store, bundle), what="the end of the engine")
    assert view.ended() == -signal.SIGKILL


def test_an_acknowledgement_that_nobody_got_is_asked_for_again(show_map: ShowMap, scratch: Path) -> None:
    """A mover was killed while the view still read by the old map: the next does not take the new map for enough."""
    with stuck_in_a_read(show_map, scratch, 42) as (scene, bundle, view):
        assert not MakeWay(60.0)(scene.world.store, bundle), "the first mover, whose questions nobody hears any more"
        assert not MakeWay(60.0)(scene.world.store, bundle), "the second"
        assert view.status()["reloads"] == 0
    make_way = MakeWay(60.0)
    wait_until(lambda: make_way(scene.world.store, bundle), what="the acknowledgement")
    assert view.status()["reloads"] >= 1
    assert view.stop() == 0


STEPS = ["one view told", "way made", "moving said", "some blocks moved", "moved, not said"]


@pytest.mark.parametrize("mode", ["optimal", "replay"])
def test_views_stay_right_when_the_agent_is_killed(make_capture: MakeCapture, scratch: Path, mode: Mode) -> None:
    """Between the views' answers and the move, and inside of the move; the next agent takes it up."""
    with followed(make_capture, 51, mode, pause=PAUSE) as (capture, work, follower):
        assert follower.run(turns=20)[0] == 0
        journal = Journal(capture.journal, bytes.fromhex(capture.set_id))
        with ExitStack() as stack:
            views: list[Watched] = []
            for number, step in enumerate(STEPS):
                source = Source(Store.open(follower.store), journal, int(capture.request("status")["durable_write"]))
                point = source.resolve(Target("newest") if number else Target("boundary", 0))
                views.append(stack.enter_context(watched(source, point, scratch / f"view{number}", number)))
                work.wait_answered(work.answered + 50)
                code, _ = follower.run(seed=number, turns=200, step=step)
                assert code == KILLED, f"the step was never reached: {step}"
                for view in views:
                    view.assert_unchanged()
                assert follower.run(seed=number, turns=5)[0] == 0
                for view in views:
                    view.assert_unchanged()


def test_a_view_that_opens_while_a_move_begins_waits_and_no_longer(
    history: Callable[[int, Mode], History],
) -> None:
    """Readers are kept out from before the views are told until the state says "moving"."""
    found = history(34, "optimal")
    store = found.store
    moments: list[tuple[str, bool]] = []
    write_blocks, make_way = found.stages.image.write_blocks, found.stages.make_way

    def watch(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        with (store.image / "lock").open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                moments.append((what, True))
            except BlockingIOError:
                moments.append((what, False))
        return call(*arguments)

    found.stages.make_way = partial(watch, "telling views", make_way)
    found.stages.image.write_blocks = partial(watch, "moving", write_blocks)  # type: ignore[method-assign]
    found.run(2)
    assert set(moments) == {("telling views", False), ("moving", True)}
    inside = threading.Event()

    def hold() -> None:
        with image_held(store):
            inside.set()

    with image_to_move(store) as let_readers_in:
        assert let_readers_in is not None
        reader = threading.Thread(target=hold)
        reader.start()
        assert not inside.wait(0.5), "a view could be opened and not be told"
        let_readers_in()
        assert inside.wait(30), "a view need not wait for the move's end"
        reader.join()
    with image_held(store), image_to_move(store) as let_readers_in:
        assert let_readers_in is None, "the next move waits for who reads by the state of this one"
