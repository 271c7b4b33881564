"""Retention when the catalog cannot be read or told, or what is stored is damaged or lost."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pgcdp import api
from pgcdp.errors import DamageError
from pgcdp.fsio import write_json
from pgcdp.progress import Progress
from pgcdp.records import Span, Target
from pgcdp.recovery import sweeping
from pgcdp.recovery.expiring import AGAIN_SECONDS, Run, Unreadable, expiring
from pgcdp.recovery.joining import join
from pgcdp.store import base, thinning
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog, catalog_file
from pgcdp.store.layout import Store
from pgcdp.store.mirroring import Mirror
from pgcdp.store.published import mirrored, published
from pgcdp.store.rebuild import rebuild
from pgcdp.store.retention import Policy
from pgcdp.store.scrub import check_store
from pgcdp.store.thinning import thin
from pgcdp.store.transactions import WAL
from tests.fix_years import HOURLY, NOW, Years, files_of, index


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
    config = SimpleNamespace(store=years.store.path, set_id_bytes=years.store.set_id, root=years.store.path.parent)
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
