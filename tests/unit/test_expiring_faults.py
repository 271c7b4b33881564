"""Retention when something is wrong or changes under it: catalog, disk, damage, late pins, other processes."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pgcdp import api
from pgcdp.errors import DamageError
from pgcdp.fsio import read_json, sync_directory, write_json
from pgcdp.postgres.relations import Look
from pgcdp.progress import Progress
from pgcdp.records import WAL_WRITE, Rewind, Span, Target
from pgcdp.recovery import expiring as steps
from pgcdp.recovery import source as reading
from pgcdp.recovery import sweeping
from pgcdp.recovery.choosing import would_go
from pgcdp.recovery.expiring import AGAIN_SECONDS, Run, Unreadable, expiring
from pgcdp.recovery.joining import join
from pgcdp.store import base, open_views, thinning
from pgcdp.store.bundle import EVENTS, Bundle
from pgcdp.store.catalog import Catalog, catalog_file
from pgcdp.store.history import add_history, history_names, read_history
from pgcdp.store.image_lock import image_to_move
from pgcdp.store.kept import keep_event
from pgcdp.store.layout import Store
from pgcdp.store.let_go import say_let_go
from pgcdp.store.mirroring import Mirror
from pgcdp.store.published import mirrored, published
from pgcdp.store.rebuild import rebuild
from pgcdp.store.retention import DAY_NS, Plan, Policy
from pgcdp.store.scrub import check_store
from pgcdp.store.thinning import Stopped, thin
from pgcdp.store.transactions import SCHEMA, WAL, write_look, write_transactions, write_wal
from tests.unit.test_expiring import AN_HOUR, HOURLY, NOW, Years, files_of

DROP_ALL = Policy(0.0, 0.0, 0.0, 0.0)


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


def carry_out(years: Years, plan: Plan) -> None:
    with expiring(years.store):
        assert not Run(years.store, Policy()).carry_out(plan).failed


def as_stored(store: Store) -> dict[int, Any]:
    return {span.last: Bundle.at(store, span).interval for span in store.spans()}


def as_told(store: Store) -> dict[int, Any]:
    return {number: each.interval for number, each in published(store).items()}


def flip(file: Path, at: int = 100) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def spoil(file: Path) -> None:
    """Every part of it."""
    raw = bytearray(file.read_bytes())
    for at in range(64, len(raw), 64):
        raw[at] ^= 1
    file.write_bytes(raw)


def no_catalog(*_: Any) -> None:
    raise DamageError("the catalog cannot be read")


# --- the catalog


def test_a_mirror_that_failed_once_is_behind_never_ahead(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild(years.store)[0].close()
    plain, failed = Catalog.put_interval, list[int]()

    def put(catalog: Catalog, bundle: Bundle) -> None:
        if not failed:
            failed.append(bundle.number)
            no_catalog()
        plain(catalog, bundle)

    monkeypatch.setattr(Catalog, "put_interval", put)
    assert years.expire(Policy(0.0)).thin == [1, 2, 3, 4, 5]
    assert failed == [1]
    assert as_told(years.store) == as_stored(years.store)


def test_a_catalog_that_cannot_forget_keeps_single_writes_and_boundaries(
    years: Years, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock or damage of the catalog is no want of room: nothing goes, and no boundary for it instead."""
    rebuild(years.store)[0].close()
    before = files_of(years.store)
    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "remove_interval", no_catalog)
        done = years.expire(Policy(least_free=1 << 40), free=lambda store: 0)
        assert (done.base, done.joins, done.thin) == (None, [], [])
        assert "the catalog cannot be read" in done.failed[0]
    after = files_of(years.store)
    assert {name: size for name, size in after.items() if not name.startswith("history")} == before
    assert not (years.store.interval(1) / "forward").exists(), "what was made for it is gone"
    assert years.expire(Policy(0.0)).thin == [1, 2, 3, 4, 5]
    assert as_told(years.store) == as_stored(years.store)


def test_a_catalog_that_is_replaced_during_a_run_is_told_of_what_goes(years: Years) -> None:
    rebuild(years.store)[0].close()

    def progress(now: Progress) -> None:
        if now.step == "letting go of single writes" and now.done == 2:
            rebuild(years.store)[0].close()

    assert years.expire(Policy(0.0), progress=progress).thin == [1, 2, 3, 4, 5]
    assert as_told(years.store) == as_stored(years.store)


def test_rebuild_waits_for_retention(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(store=years.store.path, set_id_bytes=years.store.set_id)
    monkeypatch.setattr(api, "load_config", lambda name: config)
    waits, told = threading.Event(), list[Any]()
    with expiring(years.store):
        other = threading.Thread(
            target=lambda: told.append(api.rebuild("s", lambda now: waits.set() if "waiting" in now.step else None))
        )
        other.start()
        assert waits.wait(30)
        other.join(0.5)
        assert other.is_alive()
        assert not catalog_file(years.store).exists()
    other.join(30)
    assert told[0]["intervals"] == 6


def test_an_agent_that_starts_mirrors_what_was_thinned_without_the_catalog(
    years: Years, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = years.store
    rebuild(store)[0].close()
    carry = catalog_file(store).read_bytes()
    thin(store, Span(2, 2))
    store.aside.mkdir()
    join(store, Span(3, 4))
    catalog_file(store).write_bytes(carry)
    assert as_told(store) == as_stored(store), "a manifest that was replaced is read"
    assert 2 not in mirrored(store)
    with monkeypatch.context() as patched:  # nor is a run misled for ever where nobody has caught up
        patched.setattr(Mirror, "put_interval", no_catalog)
        assert Run(store, Policy(0.0)).run(NOW).thin == [1, 5]
    catalog_file(store).write_bytes(carry)
    mirror = Mirror(store, make=True)
    mirror.catch_up()
    mirror.close()
    assert as_told(store) == as_stored(store)
    assert {1, 2, 4, 5, 6} <= mirrored(store).keys()
    assert mirrored(store)[4].interval.first == 3


# --- damage and loss


@pytest.mark.parametrize("name", base.COPIES)
def test_one_bit_of_the_oldest_boundary_costs_nothing(based: Years, name: str) -> None:
    file = based.store.bases / "0000000004" / name
    flip(file)
    report = check_store(based.store)
    assert [damage.file for damage in report.damages] == [file]
    based.assert_only(set(range(25, 38)))
    flip(file)
    assert check_store(based.store).ok


def test_damage_in_what_is_kept_with_the_oldest_boundary_costs_no_other(based: Years) -> None:
    file = based.store.bases / "0000000004" / "settings.json"
    flip(file, 20)
    (damage,) = check_store(based.store).damages
    assert (damage.file, damage.still) == (file, "every point behind boundary 4 can still be restored")
    source = based.source()
    assert source.settings(source.resolve(Target("boundary", 5)))


def test_an_oldest_boundary_that_is_lost_is_named(based: Years) -> None:
    for name in base.COPIES:
        flip(based.store.bases / "0000000004" / name)
    with pytest.raises(DamageError, match=r"base/0000000004/manifest\.json"):
        based.source().resolve(Target("newest"))
    assert "nothing can be restored" in " ".join(damage.still for damage in check_store(based.store).damages)
    shutil.rmtree(based.store.bases / "0000000004")
    assert [damage.file for damage in check_store(based.store).damages] == [based.store.bases / "0000000004"]
    with pytest.raises(DamageError, match=r"base/0000000004 is missing"):
        based.source().resolve(Target("boundary", 0))
    based.assert_restores([Target("boundary", 4), Target("boundary", 5), Target("newest")])


@pytest.mark.parametrize("number", [1, 3])
def test_an_interval_that_is_lost_is_named(years: Years, number: int) -> None:
    shutil.rmtree(years.store.interval(number))
    assert [damage.file for damage in check_store(years.store).damages] == [years.store.interval(number)]
    with pytest.raises(DamageError, match=f"intervals/{number:010d} is missing"):
        years.source().resolve(Target("boundary", number - 1))
    years.assert_restores([Target("boundary", each) for each in range(number, 6)])


def test_check_does_not_mind_files_that_go(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.walk

    def walk(place: Any) -> Any:
        for directory, below, names in plain(place):
            yield directory, below, [*names, "gone-just-now"]

    monkeypatch.setattr(os, "walk", walk)
    assert check_store(years.store).ok


def test_a_sector_that_cannot_be_read_keeps_one_interval_only(years: Years, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = thinning.copy_forward

    def copy(bundle: Bundle, *more: Any) -> Any:
        if bundle.number == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(bundle.path / "writes"))
        return plain(bundle, *more)

    monkeypatch.setattr(thinning, "copy_forward", copy)
    done = years.expire(Policy(0.0))
    assert done.thin == [1, 3, 4, 5]
    (said,) = done.failed
    assert "intervals/0000000002/writes: Input/output error" in said


def test_damage_in_the_oldest_does_not_keep_room_from_being_made(years: Years) -> None:
    spoil(years.store.interval(1) / "writes")
    clock = [0.0]
    unreadable = Unreadable(lambda: clock[0])
    start = sum(files_of(years.store).values())

    def free(store: Store) -> int:
        return start - sum(files_of(store).values())

    done = years.expire(Policy(least_free=2000), free=free, unreadable=unreadable)
    assert done.thin[:2] == [2, 3]
    assert (done.base, len(done.failed)) == (None, 1)
    assert years.expire(Policy(0.0), unreadable=unreadable).failed == [], "it is not tried each minute"
    clock[0] = AGAIN_SECONDS + 1
    assert len(years.expire(Policy(0.0), unreadable=unreadable).failed) == 1


def test_what_cannot_be_joined_is_thinned(hour: Years) -> None:
    spoil(hour.store.interval(3) / "backward.map")
    done = hour.expire(HOURLY)
    assert (done.joins, done.thin) == ([], [1, 2, 3, 4, 5])
    assert len(done.failed) == 1


def test_damage_in_what_is_known_of_wal_is_found_before_it_is_joined(hour: Years) -> None:
    """A bit that no reader looks at: what is written anew would have a right checksum."""
    for number in range(1, 7):
        index(hour.store, number)
    file = hour.store.interval(2) / WAL
    raw = file.read_bytes()
    flip(file, raw.index(b"parquet-cpp"))
    hour.store.aside.mkdir()
    with pytest.raises(DamageError, match=r"wal\.parquet has another checksum"):
        join(hour.store, Span(1, 5))
    shutil.rmtree(hour.store.aside)
    file.write_bytes(raw)
    assert hour.expire(HOURLY).joins == [Span(1, 5)]
    assert Bundle.open(hour.store, 5).has(WAL)


def index(store: Store, number: int) -> None:
    """Say of an interval that no transactions ended in it."""
    place = store.interval(number)
    manifest = read_json(place / "manifest.json")
    made = [write_transactions(place, SCHEMA.empty_table()), write_wal(place, np.zeros(3, dtype=WAL_WRITE))]
    write_json(place / EVENTS, {"events": [], "tables": []})
    entries = {each.name: {"bytes": each.bytes, "checksum": each.checksum, "length": each.length} for each in made}
    raw = (place / EVENTS).read_bytes()
    entries[EVENTS] = {"bytes": len(raw), "checksum": thinning_checksum(raw), "length": len(raw)}
    manifest["files"] |= entries
    manifest["transactions"] = {"marks": 0, "lost": 0, "count": 0, "wal_to": 0}
    write_json(place / "manifest.json", manifest)


def thinning_checksum(raw: bytes) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(raw)


def test_an_exception_leaves_no_forward_unless_the_manifest_names_it(
    years: Years, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = years.store
    with monkeypatch.context() as patched:
        patched.setattr(thinning, "write_json", lambda *_: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            thin(store, Span(1, 1))
    assert not (store.interval(1) / "forward").exists()

    def late(path: Path, content: dict[str, Any]) -> None:
        write_json(path, content)
        raise OSError(errno.EIO, "the directory was not synced")

    with monkeypatch.context() as patched:
        patched.setattr(thinning, "write_json", late)
        with pytest.raises(OSError, match="not synced"):
            thin(store, Span(1, 1))
    assert not Bundle.open(store, 1).interval.restorable_by_write
    Bundle.open(store, 1).check()
    left = store.interval(2) / "forward"
    left.write_bytes(b"what a kill left")
    assert sweeping.waiting_bytes(store)
    years.expire(Policy())
    assert not left.exists()
    years.assert_sound()


# --- what comes between


@contextmanager
def needed(years: Years, write: int, how: str) -> Any:
    """A clone is opened at a write, or a mark there is kept."""
    if how == "mark":
        add_history(years.store, "event", time.time_ns(), keep_event("late", write, True))
        yield
    else:
        with open_views.registered(years.store, years.place / "control", write) as known:
            yield
        known.forget()


@pytest.mark.parametrize("how", ["mark", "view"])
@pytest.mark.parametrize(
    ("work", "policy", "minutes", "write"),
    [
        ("thin", Policy(0.0), AN_HOUR, 9),
        ("join", HOURLY, AN_HOUR, 12),
        ("publish_base", DROP_ALL, [1500] * 6, 9),
    ],
)
def test_a_point_that_is_needed_since_the_plan_was_made_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, work: str, policy: Policy, minutes: list[int],
    write: int,
) -> None:  # fmt: skip
    years = Years(tmp_path, 54, [6] * 6, minutes)
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
    from tests.unit.test_blockmap import served

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
