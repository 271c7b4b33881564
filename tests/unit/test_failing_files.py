"""Small files of a store: each place at which one becomes durable fails once.

Then it has what it had, or what it was to have, and whoever tries again gets that: nothing half-written is ever read,
and nothing is in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from pgcdp import twice, wrapped
from pgcdp.errors import DamageError, PgcdpError
from pgcdp.keys import KeySource
from pgcdp.machine import Place
from pgcdp.postgres.relations import Look, Relation
from pgcdp.records import BLOCK, Boundary, Gap, Rewind, Volume
from pgcdp.store import gaps, rewinds
from pgcdp.store.catalog import Catalog, catalog_file
from pgcdp.store.frames import FrameReader, FrameWriter
from pgcdp.store.history import add_history, history_names, read_history
from pgcdp.store.image import Image, add_volume
from pgcdp.store.layout import Store
from pgcdp.store.lease import Lease, owner_of
from pgcdp.store.let_go import say_let_go
from pgcdp.store.notes import clear_old_catalog, notes_of
from pgcdp.store.open_views import open_views, registered, seen_views
from pgcdp.store.rebuild import rebuild
from pgcdp.store.reserve import Reserve
from pgcdp.store.retention import Plan
from pgcdp.store.scrub_record import Record, read_record, write_record
from pgcdp.store.transactions import SCHEMA, TRANSACTIONS, read_look, read_transactions, write_look, write_transactions
from tests.faults.points import python_points
from tests.faults.service import Faults
from tests.small_store import flip

SET_ID = bytes(range(16))
HERE = Place("/", "a" * 32, "uuid-1", "one", "boot-1")
KEY = bytes(32)
GAP = Gap(4, 9, "changed", 17, 23, 3)
LOOK = Look(7, {5: "shop"}, {(5, 2200): "public"}, {}, [Relation(5, 16384, "public", "orders", "r", 16384)])
BOUNDARY = Boundary(0, 4, 1, 1, 1, 1, 1, "baseline")
KINDS = {"pwrite": ("enospc", "eio", "short"), "fsync": ("eio", "lost")}


@dataclass(frozen=True)
class File:
    """`change` brings about what `read` then gives; `points`: where that becomes durable."""

    points: tuple[str, ...]
    change: Callable[[Store], object]
    read: Callable[[Store], object]
    prepare: Callable[[Store], object] = lambda store: None


def reserved(store: Store) -> int:
    return Reserve(store, HERE).bytes()


def take(store: Store) -> None:
    lease = Lease.take(store, HERE)
    lease.release()


def owner(store: Store) -> Place | None:
    found = owner_of(store)
    return found.place if found else None


def told(store: Store) -> set[str]:
    """What the history says, however often."""
    return {str(read_history(store, name)[2]) for name in history_names(store)}


def transactions(store: Store) -> int:
    """Rows of the index; -1 when there is none."""
    return len(read_transactions(store.path)) if (store.path / TRANSACTIONS).exists() else -1


def open_a_view(store: Store) -> None:
    store.image.mkdir(exist_ok=True)
    with registered(store, store.path / "control", 5) as view:
        assert [each.write for each in open_views(store)] == [5]
    view.forget()


def see_to_views(store: Store) -> None:
    """One whose engine has ended was never forgotten."""
    with registered(store, store.path / "control", 5):
        pass
    open_views(store)


def catalogued(store: Store) -> set[str]:
    if not catalog_file(store).exists():
        return set()
    catalog = Catalog.open(store)
    try:
        return catalog.history_names()
    finally:
        catalog.close()


def make_inside(store: Store) -> None:
    """As the agent does: one that is there is opened, and its small files are mended."""
    if inside(store) is not None:
        twice.mend(store.path / "one")
        return
    Store.create(store.path / "one", "inner", SET_ID, [Volume(0, "data", 8 * BLOCK)])


def began(store: Store) -> int:
    return read_record(store).began if notes_of(store).exists() else 0


def scrub(store: Store) -> None:
    write_record(store, Record(began=7))


def index_nothing(store: Store) -> None:
    write_transactions(store.path, SCHEMA.empty_table())


def inside(store: Store) -> object:
    return Store.open(store.path / "one").volumes if twice.STORE.exists(store.path / "one") else None


def wrap(store: Store) -> None:
    wrapped.write(store.path, SET_ID, KEY)


def unwraps(store: Store) -> bool:
    """Whether both files hold the same data key, and that is found."""
    if list(wrapped.damaged(store.path)):
        return False
    return len({wrapped.data_key_in(*each, KEY, SET_ID) for each in wrapped.read(store.path)}) == 1


def lose_one(store: Store) -> None:
    wrap(store)
    (store.path / wrapped.FILES[0]).write_bytes(b"not what was written")


def mend(store: Store) -> None:
    (whole,) = {wrapped.data_key_in(*each, KEY, SET_ID) for each in wrapped.read(store.path)}
    assert whole, "one copy is enough, and stays whole"
    wrapped.mend(store.path)


def lose_its_copy(store: Store) -> None:
    flip(store.path / twice.STORE.copy, 0)


def both(store: Store) -> int:
    """How many copies of store.json are whole; the store opens with the other."""
    assert Store.open(store.path) == store
    return 2 - len(list(twice.STORE.damaged(store.path)))


def make_image(store: Store) -> None:
    Image.create(store, 1).close()


def grow(store: Store) -> None:
    """As an agent does that starts again behind each error."""
    twice.mend(store.path)
    image = Image.open(Store.open(store.path), writable=True)
    image.grow(0, 16 * BLOCK)
    image.close()


def sizes(store: Store) -> list[tuple[int, bool]]:
    """Bytes of the volumes, and whether the image has files of that size."""
    rows = []
    for volume in Store.open(store.path).volumes:
        file = store.image / f"{volume.name}.img"
        rows.append((volume.bytes, file.exists() and file.stat().st_size >= volume.bytes))
    return rows


def cut_a_stream(store: Store) -> None:
    writer = FrameWriter.create(store.path / "stream", b"WRIT", SET_ID, 7, frame_bytes=1000)
    try:
        writer.append(bytes(3000))
        writer.sync()
        writer.cut(1500)
        writer.finish()
    finally:
        writer.close()


def length(store: Store) -> int | None:
    """Of a stream that was finished."""
    with (
        suppress(FileNotFoundError, DamageError),
        FrameReader.open(store.path / "stream", b"WRIT", SET_ID, 7) as reader,
    ):
        return reader.length
    return None


FILES = {
    "a gap announced": File(("store.gaps.announce.",), lambda store: gaps.announce(store, 5), gaps.may_have_gaps),
    "gaps": File(
        ("store.gaps.keep.",), lambda store: gaps.keep(store, [GAP]), gaps.kept, lambda store: gaps.announce(store, 3)
    ),
    "rewinds": File(("store.rewinds.keep.",), lambda store: rewinds.keep(store, [Rewind(4, 9, 2, None)]), rewinds.kept),
    "history": File(("store.history.",), lambda store: add_history(store, "event", 5, {"event": "x"}), told),
    "what retention does": File(
        ("store.let_go.", "store.history."), lambda store: say_let_go(store, 5, "agent", Plan(base=3)), told
    ),
    "owner": File(("store.lease.",), take, owner),
    "scrub": File(("store.scrub_record.", "store.notes.make_notes."), scrub, began),
    "store.json": File(
        ("twice.Twice.write.",),
        lambda store: store.with_baseline(BOUNDARY), lambda store: Store.open(store.path).baseline,
    ),
    "a store": File(("store.layout.", "twice.Twice.write."), make_inside, inside),
    "transactions": File(("store.parquet.",), index_nothing, transactions),
    "names": File(
        ("store.parquet.",), lambda store: write_look(store.path, LOOK), lambda store: read_look(store.path) is not None
    ),
    "catalog": File(
        ("store.rebuild.", "store.catalog.", "store.notes."), lambda store: rebuild(store)[0].close(), catalogued,
        lambda store: add_history(store, "event", 5, {"event": "x"}),
    ),
    "old catalog": File(
        ("store.notes.clear_old_catalog.",), clear_old_catalog, lambda store: (store.path / "catalog.db").exists(),
        lambda store: (store.path / "catalog.db").write_bytes(b"of before"),
    ),
    "an image": File(
        ("store.image.Image.create.", "twice.Twice.write."), make_image, lambda store: twice.STATE.exists(store.image)
    ),
    "an image given up": File(
        ("twice.Twice.remove.",), lambda store: twice.STATE.remove(store.image),
        lambda store: twice.STATE.exists(store.image), make_image,
    ),
    "a small file's lost copy": File(
        ("twice.Twice.write.",), lambda store: twice.mend(store.path), both, lose_its_copy
    ),
    "a larger image": File(("store.image_files.VolumeFiles.grow.", "twice.Twice.write."), grow, sizes, make_image),
    "one more volume": File(
        ("store.image.add_volume.", "store.image_files.VolumeFiles.grow.", "twice.Twice.write."),
        lambda store: add_volume(store, Volume(1, "wal", 8 * BLOCK)), sizes, make_image,
    ),
    "a stream": File(("store.frames.FrameWriter.cut.",), cut_a_stream, length),
    "a view": File(("store.open_views.",), open_a_view, seen_views),
    "a view that ended": File(("store.open_views.open_views.",), see_to_views, seen_views),
    "data key": File(("wrapped.write.",), wrap, unwraps),
    "the reserve": File(("store.reserve.",), lambda store: Reserve(store, HERE).make(), reserved),
    "the reserve given free": File(
        ("store.reserve.",), lambda store: Reserve(store, HERE).release(), reserved,
        lambda store: Reserve(store, HERE).make(),
    ),
    "a copy of the data key": File(("wrapped.mend.",), mend, unwraps, lose_one),
}  # fmt: skip


def names(store: Store) -> set[str]:
    """Of all files in the store, with numbers of history entries and views left out."""
    return {path.name for path in store.path.rglob("*") if path.parent not in (store.history, store.image / "views")}


def make(place: Path, file: File) -> Store:
    store = Store.create(place, "s", SET_ID, [Volume(0, "data", 8 * BLOCK)])
    file.prepare(store)
    return store


def fail_at_each(tmp_path: Path, failing: Faults, file: File) -> list[str]:
    """Each place, each way, and each time that it is come by; the points that failed."""
    whole = make(tmp_path / "whole", file)
    before = file.read(whole)
    file.change(whole)
    wanted = file.read(whole)
    came: list[str] = []
    for point in sorted(name for name in python_points() if name.startswith(file.points)):
        for kind in KINDS.get(point.rpartition(".")[2], ("enospc", "eio")):
            for skip in count():  # a place may be come by for each of several files, and for their directory
                store = make(tmp_path / f"{point}-{kind}-{skip}", file)
                failing.set(point, kind, skip=skip)
                with suppress(OSError, PgcdpError):
                    file.change(store)
                failing.clear(point)
                fired = failing.fired(point)
                came += fired
                assert file.read(store) in (before, wanted), (point, kind, skip)
                file.change(store)
                assert file.read(store) == wanted, (point, kind, skip)
                assert names(store) == names(whole), (point, kind, skip)
                if not fired:
                    break
    return came


@pytest.mark.parametrize("what", ["transactions", "names", "store.json"])
def test_a_small_file_of_an_encrypted_store(tmp_path: Path, failing: Faults, key: KeySource, what: str) -> None:
    came = fail_at_each(tmp_path, failing, FILES[what])
    assert any(point.endswith(".pwrite") for point in came)


@pytest.mark.parametrize("what", FILES)
def test_a_small_file_has_what_it_had_or_was_to_have(tmp_path: Path, failing: Faults, what: str) -> None:
    assert fail_at_each(tmp_path, failing, FILES[what]), "it becomes durable nowhere"
