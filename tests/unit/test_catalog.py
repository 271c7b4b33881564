"""The catalog is remade from the store alone, and one that lies is not believed."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pgcdp.errors import DamageError, PgcdpError
from pgcdp.records import Interval
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog, catalog_file
from pgcdp.store.layout import Store
from pgcdp.store.notes import make_notes
from pgcdp.store.published import published
from pgcdp.store.rebuild import rebuild
from pgcdp.store.survey import survey
from tests.small_store import boundary, flip, make_store


def test_catalog_is_rebuilt_from_the_store_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    catalog = Catalog.open(store)
    catalog.put_baseline(boundary(0))
    for number in store.interval_numbers():
        catalog.put_interval(Bundle.open(store, number))
    for ok in (True, False):
        catalog.remember("verification", 77, {"interval": 2, "ok": ok})
    catalog.remember("restore", 78, {"write": 5})
    before = (catalog.intervals(), catalog.baseline(), catalog.history("verification"), catalog.history("restore"))
    assert catalog.last_verification(2) == {"interval": 2, "ok": False, "time_ns": 77}
    assert catalog.last_verification(1) is None
    assert catalog.intervals()[2].interval == Bundle.open(store, 2).interval
    catalog.close()
    raw = catalog_file(store).read_bytes()
    for damage in (None, b"not a database" * 1000, raw[:100] + b"\xff" * 5000):
        for path in catalog_file(store).parent.glob("catalog.db*"):
            path.unlink()
        if damage is not None:
            catalog_file(store).write_bytes(damage)
        again, damages = rebuild(Store.open(store.path))
        assert not damages
        after = (again.intervals(), again.baseline(), again.history("verification"), again.history("restore"))
        assert after == before
        again.close()
    flip(store.interval(2) / "manifest.json", 30)
    again, damages = rebuild(store)
    assert [str(store.interval(2)) in damage.message for damage in damages] == [True]
    assert list(again.intervals()) == [1, 3]
    again.close()


def test_a_catalog_that_cannot_be_opened_is_no_bug_of_ours(tmp_path: Path) -> None:
    """As where no descriptor is to be had: SQLite opens the file before anything is asked of it."""
    store = make_store(tmp_path, 1)
    Catalog.open(store).close()
    for path in catalog_file(store).parent.glob("catalog.db*"):
        path.unlink()
    catalog_file(store).mkdir()
    with pytest.raises(PgcdpError, match=r"catalog\.db cannot be used now: unable to open database file"):
        Catalog.open(store)


def test_a_catalog_that_another_process_is_just_making_is_waited_for(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    make_notes(store)
    other = sqlite3.connect(catalog_file(store), isolation_level=None)
    other.execute("begin immediate")
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(Catalog.open, store)
        try:
            with pytest.raises(TimeoutError):
                opened.result(timeout=0.3)
        finally:
            other.execute("rollback")
            other.close()
        opened.result(timeout=30).close()


def test_several_make_a_catalog_at_once(tmp_path: Path) -> None:
    """An agent, its keeper that has replaced a capture process, and a command."""
    store = make_store(tmp_path, 1)
    for number in range(10):
        place, gate = tmp_path / f"{number}.db", threading.Barrier(4)

        def make(place: Path = place, gate: threading.Barrier = gate) -> int:
            gate.wait()
            catalog = Catalog(store, place)
            catalog.put_interval(Bundle.open(store, 1))
            found = len(catalog.intervals())
            catalog.close()
            return found

        with ThreadPoolExecutor(4) as pool:
            assert [each.result() for each in [pool.submit(make) for _ in range(4)]] == [1] * 4


def test_damaged_catalog_says_how_to_mend_it(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    Catalog.open(store).close()
    catalog_file(store).write_bytes(b"x" * 8192)
    with pytest.raises(DamageError, match=r"catalog\.db cannot be read") as caught:
        Catalog.open(store)
    assert "pgcdp rebuild" in str(caught.value.hint)


def test_a_catalog_that_lies_is_not_believed(tmp_path: Path) -> None:
    """A flipped digit in a row, a missing row, one of before or of later, none at all: the manifests say the truth."""
    store = make_store(tmp_path)
    truth = {number: Bundle.open(store, number).interval for number in store.interval_numbers()}
    rebuild(store)[0].close()

    def listed() -> dict[int, Interval]:
        return {number: each.interval for number, each in published(store).items()}

    def change(statement: str) -> None:
        with sqlite3.connect(catalog_file(store)) as connection:
            assert connection.execute(statement).rowcount
        connection.close()

    change("update intervals set checksum = checksum")
    assert listed() == truth
    change("update intervals set content = replace(content, ', ', ', 9') where content like '[1, %'")
    assert listed() == truth
    change("delete from intervals where number = 2")
    assert listed() == truth
    with sqlite3.connect(catalog_file(store)) as connection:
        connection.executescript(
            "drop table intervals; create table intervals (number, content); pragma user_version = 1"
        )
    connection.close()
    assert listed() == truth
    rebuild(store)[0].close()
    with sqlite3.connect(catalog_file(store)) as connection:
        connection.execute("pragma user_version = 99")
    connection.close()
    later = Catalog.open(store)
    assert later.intervals() == {}
    later.close()
    assert listed() == truth
    catalog_file(store).write_bytes(b"not a database" * 1000)
    assert listed() == truth
    catalog_file(store).unlink()
    assert listed() == truth


def test_a_verification_that_the_catalog_tells_wrongly_is_not_told(tmp_path: Path) -> None:
    """A failed one must not become a right one by a flipped bit."""
    store = make_store(tmp_path)
    catalog = Catalog.open(store)
    catalog.remember("verification", 77, {"interval": 2, "ok": False})
    assert catalog.last_verification(2) == {"interval": 2, "ok": False, "time_ns": 77}
    catalog.close()
    with sqlite3.connect(catalog_file(store)) as connection:
        connection.execute("update history set content = replace(content, 'false', 'true')")
    connection.close()
    catalog = Catalog.open(store)
    assert catalog.last_verification(2) is None
    assert catalog.history("verification") == []
    with pytest.raises(DamageError, match="is not as it was written"):
        catalog.check()
    catalog.close()


def test_listing_intervals_passes_over_what_is_damaged(tmp_path: Path) -> None:
    """A point behind a damaged interval can be listed and opened: only who needs the damaged file is refused."""
    store = make_store(tmp_path)
    rebuild(store)[0].close()
    (store.interval(1) / "manifest.json").write_text("{}")
    with pytest.raises(DamageError):
        published(store)
    listed = survey(store)
    assert list(listed) == store.interval_numbers()
    assert (listed[1].interval.from_write, listed[1].interval.to_write, bool(listed[1].damage)) == (1, 10, True)
    assert not any(each.damage for number, each in listed.items() if number > 1)
