"""Retention beside others: late pins, agents that stop, readers; and what is said of it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pgcdp.errors import DamageError
from pgcdp.fsio import read_json, sync_directory, write_json
from pgcdp.postgres.relations import Look
from pgcdp.records import Rewind, Span, Target
from pgcdp.recovery import expiring as steps
from pgcdp.recovery import sweeping
from pgcdp.recovery import writes as reading
from pgcdp.recovery.choosing import would_go
from pgcdp.recovery.expiring import Run
from pgcdp.recovery.joining import join
from pgcdp.store import base, open_views, thinning
from pgcdp.store.bundle import Bundle
from pgcdp.store.history import add_history, history_names, read_history
from pgcdp.store.image_lock import image_to_move
from pgcdp.store.kept import keep_event
from pgcdp.store.layout import Store
from pgcdp.store.let_go import say_let_go
from pgcdp.store.retention import DAY_NS, Plan, Policy
from pgcdp.store.scrub import check_store
from pgcdp.store.thinning import Stopped, thin
from pgcdp.store.transactions import write_look
from tests.fix_years import AN_HOUR, DROP_ALL, HOURLY, NOW, Years, carry_out
from tests.unit.test_blockmap import served

# --- what comes between


@contextmanager
def needed(years: Years, write: int, how: str) -> Any:
    """A clone is opened at a write, or a mark there is kept, or a boundary is verified."""
    if how == "mark":
        add_history(years.store, "event", time.time_ns(), keep_event("late", write, True))
        yield
    elif how == "verification":
        point = {"write": write, "boundary": 1, "lsn": None}
        add_history(years.store, "verification", time.time_ns(), {"recovery_point": point, "ok": True})
        yield
    else:
        with open_views.registered(years.store, years.place / "control", write) as known:
            yield
        known.forget()


@pytest.mark.parametrize(
    ("work", "policy", "minutes", "write", "how"),
    [
        *(("thin", Policy(0.0), AN_HOUR, 9, how) for how in ("mark", "view")),
        *(("join", HOURLY, AN_HOUR, 12, how) for how in ("mark", "view", "verification")),
        *(("publish_base", DROP_ALL, [1500] * 6, 9, how) for how in ("mark", "view", "verification")),
    ],
)
def test_a_point_that_is_needed_since_the_plan_was_made_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str, policy: Policy, minutes: list[int], write: int,
    how: str,
) -> None:  # fmt: skip
    years = Years(tmp_path, 54, [6] * 6, minutes)
    if how == "verification":
        write = Bundle.open(years.store, 1).interval.to_write
    plain: Callable[..., Any] = getattr(steps, work)
    begun = list[Any]()

    def late(store: Store, span: Span, *more: Any) -> Any:
        if not begun:  # all of it is done, but that it counts
            begun.append(pin.__enter__())
        return plain(store, span, *more)

    pin = needed(years, write, how)
    monkeypatch.setattr(steps, work, late)
    try:
        done = years.expire(policy)
        assert begun
        assert not done.failed
        assert years.source().resolve(Target("write", write)).write == write
        assert served_right(years, write)
    finally:
        if begun:
            pin.__exit__(None, None, None)
    assert not list(years.store.aside.iterdir())


def served_right(years: Years, write: int) -> bool:

    return served(years.mapped(years.source().resolve(Target("write", write)))) == years.at(write)


def test_no_more_goes_than_was_shown(years: Years) -> None:
    """An hour passes between the question and the answer; or nothing was shown, and so nothing was asked."""
    two_hours = Policy(2 * 3600.0 - 60)
    shown = would_go(years.store, two_hours, NOW).stages
    assert shown == [Plan(thin=(1, 2))]
    done = years.run(Policy(0.0), shown=shown)
    assert done.thin == [1, 2]
    assert years.run(DROP_ALL, shown=[Plan()]).steps() == (None, 0, 0)
    assert years.run(Policy(least_free=1 << 40), shown=[], free=lambda store: 0).steps() == (None, 0, 0)


def test_room_that_is_shown_is_all_of_it_and_no_more_is_made(years: Years) -> None:
    policy = Policy(least_free=1 << 40)
    shown = would_go(years.store, policy, NOW, 0)
    assert shown.together() == Plan(5)
    assert shown.stages[0].thin == (1, 2, 3, 4, 5)
    done = years.run(policy, shown=shown.stages[:1], free=lambda store: 0)
    assert (done.base, done.thin) == (None, [1, 2, 3, 4, 5])
    assert "pgcdp expire again shows what else would go" in done.failed[-1]
    done = years.run(policy, free=lambda store: 0)
    assert done.base == 5
    assert "nothing else may be let go of" in done.failed[-1]


def test_a_pin_that_keeps_the_base_is_named_and_what_lies_behind_it_makes_room(years: Years) -> None:
    add_history(years.store, "event", 1, keep_event("before all", 1, True))
    done = years.run(Policy(least_free=1 << 40), free=lambda store: 0)
    assert done.base is None
    assert done.joins == [Span(1, 5)]
    assert 'behind the kept mark "before all" at write 1' in done.failed[-1]
    years.assert_only({1, *range(31, 38)})
    years.assert_sound()


def test_a_step_is_left_in_the_middle_when_the_agent_stops(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped):
        thin(years.store, Span(1, 1), stop=lambda: True)
    assert not (years.store.interval(1) / "forward").exists()
    years.store.aside.mkdir()
    with pytest.raises(Stopped):
        join(years.store, Span(1, 5), stop=lambda: True)
    copying = []

    def copy(bundle: Bundle, path: Path, *more: Any) -> Any:
        copying.append(path)
        return plain(bundle, path, *more)

    plain = thinning.copy_forward
    monkeypatch.setattr(thinning, "copy_forward", copy)
    done = years.expire(Policy(0.0), stop=lambda: len(copying) == 2)
    assert done.thin == [1]
    assert copying
    assert not (years.store.interval(2) / "forward").exists()


# --- what is said of it


def test_the_history_says_what_goes_before_it_goes(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = sweeping.Quiet.__call__

    def quiet(self: sweeping.Quiet) -> Any:
        seen.append([read_history(years.store, name)[2] for name in history_names(years.store)])
        return plain(self)

    monkeypatch.setattr(sweeping.Quiet, "__call__", quiet)
    years.expire(Policy(0.0), by="user ann")
    told = {"event": "expire", "by": "user ann", "base": None, "joined": [], "thinned": [[1, 5]]}
    assert seen == [[told]] * 5
    years.expire(DROP_ALL, by="user ann")
    assert seen[-1] == [told, {**told, "base": 1, "joined": [[2, 3], [4, 5]], "thinned": []}]
    years.expire(DROP_ALL, by="user ann")
    assert len(history_names(years.store)) == 2, "nothing is said of nothing"


def test_what_finds_no_room_in_the_history_is_said_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    years = Years(tmp_path, 57, [6] * 6, [1500] * 6)
    plain, tried = say_let_go, list[Plan]()

    def say(store: Store, time_ns: int, by: str, found: Plan) -> Any:
        tried.append(found)
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(store, time_ns, by, found)

    monkeypatch.setattr(steps, "say_let_go", say)
    assert years.expire(DROP_ALL).base == 5
    assert [read_history(years.store, name)[2]["base"] for name in history_names(years.store)] == [5]


def test_what_was_done_before_something_is_in_the_way_is_logged(
    years: Years, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(years.store, Policy(0.0))
    plain = thin

    def failing(store: Store, span: Span, *more: Any) -> Any:
        if span.last == 3:
            raise OSError(errno.EROFS, "Read-only file system")
        return plain(store, span, *more)

    monkeypatch.setattr(steps, "thin", failing)
    with pytest.raises(OSError, match="Read-only"):
        run.run(NOW)
    with caplog.at_level("INFO"):
        run.done.tell()
    assert "single writes of 2 gone" in caplog.text


def test_what_an_agent_lets_go_of_on_a_day_is_one_event(years: Years) -> None:
    noon = NOW // DAY_NS * DAY_NS + DAY_NS // 2
    say_let_go(years.store, noon, "agent", Plan(2, (Span(3, 4),), (7, 9)))
    say_let_go(years.store, noon + 1, "agent", Plan(None, (Span(3, 6),), (8,)))
    say_let_go(years.store, noon + DAY_NS, "agent", Plan(thin=(10,)))
    (one, other) = [read_history(years.store, name)[2] for name in history_names(years.store)]
    assert (one["base"], one["joined"], one["thinned"]) == (2, [[3, 4], [3, 6]], [[7, 9]])
    assert other["thinned"] == [[10, 10]]
    assert check_store(years.store).ok


# --- smaller


def test_readers_are_kept_out_for_the_renames_only(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes time, syncs and the removal itself, comes behind that."""
    for number in range(1, 6):
        thin(years.store, Span(number, number))
    inside, synced = [False], list[Path]()
    plain, sync, remove = image_to_move, sync_directory, sweeping.clear_aside

    @contextmanager
    def moving(store: Store) -> Any:
        with plain(store) as let_in:
            inside[0] = True
            yield let_in
            inside[0] = False

    def syncing(path: Path) -> None:
        assert not inside[0]
        synced.append(path)
        sync(path)

    def removing(store: Store) -> None:
        assert not inside[0]
        remove(store)

    monkeypatch.setattr(sweeping, "image_to_move", moving)
    monkeypatch.setattr(sweeping, "sync_directory", syncing)
    monkeypatch.setattr(sweeping, "clear_aside", removing)
    assert not sweeping.sweep(years.store).waiting
    assert len(synced) == len(set(synced)) == 5
    assert not (years.store.interval(1) / "writes").exists()


def test_who_only_looks_waits_for_what_is_being_written(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tries = open_views._read, []

    def read(file: Path) -> Any:
        tries.append(file)
        if len(tries) == 1:
            raise DamageError("it is locked and empty yet")
        return plain(file)

    with open_views.registered(years.store, years.place / "control", 7):
        monkeypatch.setattr(open_views, "_read", read)
        assert [view.write for view in open_views.seen_views(years.store)] == [7]


def test_an_oldest_boundary_that_is_swept_while_it_is_read(based: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, listed = Store.base_number, list[int]()

    def number(store: Store) -> int:
        found = plain(store)
        if not listed:
            listed.append(found)
            carry_out(based, Plan(base=5))
        return found

    monkeypatch.setattr(Store, "base_number", number)
    found = base.read_base(based.store)
    assert found is not None
    assert found.number == 5


def test_a_rewind_to_the_oldest_boundary_keeps_its_names(tmp_path: Path) -> None:
    from pgcdp.intervals.indexing import Start, cluster_of

    years = Years(tmp_path, 55, [6] * 4, [30] * 4)
    place = years.store.interval(2)
    made = write_look(place, Look(77, {1: "db"}, {}, {}, ()))
    manifest = read_json(place / "manifest.json")
    manifest["files"][made.name] = {"bytes": made.bytes, "checksum": made.checksum, "length": made.length}
    write_json(place / "manifest.json", manifest)
    carry_out(years, Plan(base=2))
    start = start_behind(years.store, Start, cluster_of(years.store, 1, {}))
    past = start.past_of([Rewind(26, 30, 13)])
    assert past.look is not None
    assert past.look.lsn == 77


def start_behind(store: Store, start: Any, cluster: Any) -> Any:
    found = object.__new__(start)
    object.__setattr__(found, "store", store)
    object.__setattr__(found, "boundary", Bundle.open(store, 4).interval.boundary)
    return found


def test_reading_that_misses_something_each_time_is_held_at_last(years: Years) -> None:
    """A long run takes away intervals faster than a list of all transactions is read."""
    source, tries = years.source(), []

    def attempt() -> str:
        tries.append(Run(years.store, Policy()))
        with image_to_move(years.store) as free:
            if free is not None:
                (years.store.interval(len(tries)) / "unseen").mkdir()
                os.utime(years.store.path / "intervals", ns=(len(tries), len(tries)))
                raise FileNotFoundError
        return "read"

    assert source.again(attempt) == "read"
    assert len(tries) == reading.ATTEMPTS
