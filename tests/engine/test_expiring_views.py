"""Open views while retention takes away what they read: what counts no more stays on disk until they end.

Nothing of a view is read before the expiry: the engine opens files when they are first read.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pgcdp.intervals.increments import close_interval, move_image
from pgcdp.records import Span, Target
from pgcdp.recovery.expiring import Run, expiring
from pgcdp.recovery.make_way import MakeWay
from pgcdp.recovery.sweeping import sweep, waiting_bytes
from pgcdp.recovery.view import shown
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import Image
from pgcdp.store.image_lock import image_held, image_to_move
from pgcdp.store.kept import kept_marks
from pgcdp.store.layout import Store
from pgcdp.store.open_views import seen_views
from pgcdp.store.retention import Plan, Policy
from pgcdp.store.thinning import thin
from tests.fix_years import EVERYTHING_OLD, MINUTE_NS, Years, files_of
from tests.stopping import stop
from tests.unit.test_increments import capture, fill, random_op
from tests.waiting import wait_until


@dataclass
class Shown:
    """A view of a write, and what it must show."""

    write: int
    files: list[Path]
    wanted: list[bytes]

    def assert_right(self) -> None:
        assert [file.read_bytes() for file in self.files] == self.wanted, f"the view of write {self.write}"


class Views:
    def __init__(self, years: Years) -> None:
        self.years = years
        self.stack = ExitStack()

    def open(self, write: int) -> Shown:
        place = self.years.place / f"view{write}-{len(list(self.years.place.iterdir()))}"
        place.mkdir()
        source = self.years.source()
        files = self.stack.enter_context(shown(source, source.resolve(Target("write", write)), place))
        return Shown(write, files, self.years.at(write))


@pytest.fixture
def years(tmp_path: Path) -> Years:
    return Years(tmp_path, 21, [9] * 12, [5] * 12, 4)


def cut_and_move(years: Years) -> None:
    """One more interval; the image moves under the open views, as the agent does it."""
    years.count += 1
    years.time_ns += 5 * MINUTE_NS
    capture(years.world, [random_op(years.chooser) for _ in range(9)], years.chooser)
    opened = fill(years.world, years.count, len(years.world.ops))
    image = Image.open(years.store, writable=True)
    bundle = close_interval(years.store, opened, image, years.end_of(years.count), {"number": years.count})
    make_way = MakeWay(30.0)
    with image_to_move(years.store) as let_readers_in:
        assert let_readers_in is not None
        wait_until(lambda: make_way(years.store, bundle), what="that the views have their maps")
        move_image(image, bundle, "optimal", let_readers_in)
    image.close()


def test_views_read_on_while_all_that_they_read_is_let_go_of(years: Years) -> None:
    views = Views(years)
    with views.stack:
        inside, boundary = views.open(22), views.open(46)  # in interval 3, at boundary 5
        newest = views.open(len(years.world.ops))
        assert {view.write for view in seen_views(years.store)} == {22, 46, newest.write}
        done = years.expire(EVERYTHING_OLD)
        assert done.waiting == "an open view reads some of it"
        assert Bundle.open(years.store, 3).interval.restorable_by_write, "step could not come back to it"
        assert [span for span in done.joins if span.last >= 5] == [Span(4, 5), Span(6, 11)]
        assert waiting_bytes(years.store)
        for view in (inside, boundary, newest):
            view.assert_right()
        cut_and_move(years)
        years.expire(EVERYTHING_OLD)
        cut_and_move(years)
        years.expire(EVERYTHING_OLD)
        late = views.open(46)
        for view in (inside, boundary, newest, late):
            view.assert_right()
    assert years.expire(EVERYTHING_OLD).waiting == ""
    assert not waiting_bytes(years.store)
    years.assert_sound()


def test_single_writes_that_a_view_reads_stay_until_it_ends(years: Years) -> None:
    """A view that was opened between the plan and the moment when they went."""
    views = Views(years)
    store = years.store
    with views.stack:
        view = views.open(22)
        thin(store, Span(3, 3))
        assert not Bundle.open(store, 3).interval.restorable_by_write
        assert sweep(store).waiting
        view.assert_right()
    assert not sweep(store).waiting
    assert not (store.interval(3) / "writes").exists()
    assert not kept_marks(store)
    years.expire(Policy())
    years.assert_sound()


def test_a_view_that_does_not_tell_keeps_everything(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the debugger, or its disk hangs: what it reads is not known."""
    import os
    import signal

    from pgcdp.capture import volumes
    from pgcdp.recovery import sweeping

    monkeypatch.setattr(sweeping, "MOMENT_SECONDS", 0.3)
    views = Views(years)
    with views.stack:
        view = views.open(46)
        (pid,) = {pid for pid, _ in volumes.users_of(view.files[0].parents[1]) if pid != os.getpid()}
        stop(pid)
        try:
            done = years.expire(EVERYTHING_OLD)
            assert "did not answer" in done.waiting
            assert years.store.interval(1).is_dir()
        finally:
            os.kill(pid, signal.SIGCONT)
        view.assert_right()
    assert years.expire(EVERYTHING_OLD).waiting == ""
    years.assert_sound()


def test_an_open_view_does_not_switch_off_the_making_of_room(years: Years) -> None:
    """Something waits for it; what does not, makes room. When nothing comes back any more, that is said."""
    views = Views(years)
    start = sum(files_of(years.store).values())

    def free(store: Store) -> int:
        return start - sum(files_of(store).values())

    with views.stack:
        view = views.open(46)  # it reads all increments behind boundary 5
        with expiring(years.store):
            assert Run(years.store, Policy()).carry_out(Plan(joins=(Span(6, 8),))).waiting
        missing = free(years.store)
        done = years.expire(Policy(least_free=missing + 1), free=free)
        assert (done.thin, done.base, done.joins, done.failed) == ([1], None, [], [])
        done = years.expire(Policy(least_free=1 << 40), free=free)
        assert done.thin[0] == 2
        assert done.thin[-1] == 11
        assert done.base == 5
        assert not done.joins
        assert "bytes less than least_free are free, and what was let go of comes back later" in done.failed[-1]
        view.assert_right()
    assert years.expire(Policy(least_free=1 << 40), free=free).base == 11
    assert not waiting_bytes(years.store)
    years.assert_sound()


def test_readers_that_hold_the_image_end_the_making_of_room(years: Years) -> None:
    """What was let go of is still there: how much is missing is not known."""
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 100

    with image_held(years.store):
        thin(years.store, Span(1, 1))
        done = years.expire(Policy(least_free=1 << 40), free=lambda store: 0, stop=stop)
        assert (done.base, done.thin) == (None, [])
        assert "a reader holds the image" in done.failed[-1]
    assert len(asked) <= 100
