"""The two small files of a store are there twice: one that is damaged, lost or behind costs nothing."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pgcdp import fsio, sealing, twice
from pgcdp.capture.checks import ProtectRequest, check_places
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.intervals.stages import Stages, StageSettings
from pgcdp.keys import KeySource
from pgcdp.records import BLOCK, Volume
from pgcdp.recovery.make_way import MakeWay
from pgcdp.store.image import Image, read_state
from pgcdp.store.layout import Store
from pgcdp.store.rebuild import rebuild
from pgcdp.store.scrub import check_store
from pgcdp.twice import STATE, STORE, Twice
from tests.small_store import SET_ID, flip, make_store
from tests.stage_history import KeepAll
from tests.unit.test_increments import World, boundary, make_world, run_interval

FILES = [(STORE, ""), (STATE, "image")]


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda file: flip(file, file.stat().st_size // 2, 6),
    "cut off": cut_off,
    "empty": emptied,
    "missing": lambda file: file.unlink(),
}


class Killed(Exception):
    """In place of a kill."""


def kill_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Each call that makes something durable is a step; from this one on none is done."""
    done = iter(range(step))

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if next(done, None) is None:
                raise Killed
            return real(*args)

        return call

    for name in ("fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def old_store(store: Store) -> None:
    """As a pgcdp of before has written it: one file each, without what is new in it."""
    for file, below in FILES:
        place = store.path / below
        content = fsio.read_json(place / file.name)
        kept = {key: value for key, value in content.items() if key not in (twice.MARK, "revision")}
        fsio.write_json(place / file.name, kept)
        (place / file.copy).unlink()


def unreadable(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    """As files with a bad sector are."""
    real = fsio.read_file

    def read(path: Path) -> bytes:
        if path in files:
            raise OSError(5, "Input/output error", os.fspath(path))
        return real(path)

    monkeypatch.setattr(fsio, "read_file", read)


# --- killed


@pytest.mark.parametrize("gone", range(3), ids=["both there", "without the first", "without the second"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_nothing_goes_back(tmp_path: Path, gone: int) -> None:
    """Even where one of both was lost before."""
    found = list[int]()
    for step in range(40):
        (tmp_path / f"{step}").mkdir()
        store = make_store(tmp_path / f"{step}", 0)
        if gone:
            (store.path / STORE.names[gone - 1]).unlink()
        with pytest.MonkeyPatch.context() as patch:
            kill_before(patch, step)
            try:
                store.with_bytes(0, 128 * BLOCK)
            except Killed:
                ended = False
            else:
                ended = True
        found.append(Store.open(store.path).volumes[0].bytes // BLOCK)
        twice.mend(store.path)
        assert len({(store.path / name).read_bytes() for name in STORE.names}) == 1
        assert Store.open(store.path).volumes[0].bytes // BLOCK == found[-1], "what counted once is not taken back"
        if ended:
            break
    assert ended
    assert found == sorted(found), "it was there after an earlier kill already"
    assert {found[0], found[-1]} == {64, 128}


def test_a_move_of_the_image_that_is_killed_at_any_step_goes_on_from_where_it_says(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0)
    image = Image.open(store, writable=True)
    seen = list[tuple[int, int | None]]()
    changes: list[Callable[[], None]] = [lambda: image.set_moving(1), lambda: image.set_at(1, 10)]
    for change in changes:
        for step in range(40):
            with pytest.MonkeyPatch.context() as patch:
                kill_before(patch, step)
                try:
                    change()
                except Killed:
                    pass
                else:
                    break
            state = read_state(store)
            seen.append((state.boundary, state.to))
    image.close()
    order: list[tuple[int, int | None]] = [(0, None), (0, 1), (1, None)]
    assert [order.index(each) for each in seen] == sorted(order.index(each) for each in seen)
    assert set(seen) == set(order)


def test_the_image_does_not_move_before_both_copies_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, 0)
    image = Image.open(store, writable=True)
    real = fsio.write_json

    def first_alone(path: Path, content: dict[str, object]) -> None:
        if path.name == STATE.copy:
            raise Killed
        real(path, content)

    monkeypatch.setattr(fsio, "write_json", first_alone)
    with pytest.raises(Killed):
        image.set_moving(1)
    assert image.state.state == "at", "whoever tries again writes both"
    monkeypatch.undo()
    image.set_moving(1)
    image.close()
    assert [fsio.read_json(store.image / name)["to"] for name in STATE.names] == [1, 1]


# --- damaged


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(("file", "below"), FILES, ids=["store", "state"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_damaged_copy_is_named_costs_nothing_and_is_mended(
    tmp_path: Path, request: pytest.FixtureRequest, encrypted: bool, how: str, file: Twice, below: str, which: int
) -> None:
    if encrypted:
        request.getfixturevalue("key")
    store = make_store(tmp_path)
    place = store.path / below
    hit, other = place / file.names[which], place / file.names[1 - which]
    before = read_state(store)
    DAMAGES[how](hit)
    assert Store.open(store.path) == store
    assert read_state(store) == before
    for full in (False, True):
        (found,) = check_store(store, full).damages
        assert found.file == hit
        assert str(hit) in found.message
        assert f"as long as {other} is whole" in found.still
        assert found.lost is None, "every point is there"
    rebuild(store)[0].close()
    assert check_store(store).ok
    DAMAGES[how](hit)
    assert twice.mend(store.path) == [hit]
    assert twice.mend(store.path) == []
    assert check_store(store).ok
    assert hit.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("file", "below"), FILES, ids=["store", "state"])
def test_what_an_agent_is_writing_is_not_written_over_by_a_rebuild(tmp_path: Path, file: Twice, below: str) -> None:
    """It would be what the agent wrote before: an image half moved would pass for one that stands."""
    store = make_store(tmp_path)
    DAMAGES["missing"](store.path / below / file.copy)
    with store.lock():
        rebuild(store)[0].close()
        assert not (store.path / below / file.copy).exists()
    rebuild(store)[0].close()
    assert check_store(store).ok


@pytest.mark.parametrize(("file", "below"), FILES, ids=["store", "state"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_copy_that_cannot_be_read_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Twice, below: str, which: int
) -> None:
    store = make_store(tmp_path)
    hit = store.path / below / file.names[which]
    unreadable(monkeypatch, hit)
    assert Store.open(store.path) == store
    assert read_state(store).boundary == 3
    (found,) = check_store(store).damages
    assert found.file == hit
    assert found.message == f"{hit} cannot be read at offset 0: Input/output error"


@pytest.mark.parametrize(("file", "below"), FILES, ids=["store", "state"])
def test_damage_of_both_is_damage_and_nothing_is_written_over_it(tmp_path: Path, file: Twice, below: str) -> None:
    store = make_store(tmp_path)
    one, other = (store.path / below / name for name in file.names)
    flip(one, 5)
    cut_off(other)
    left = one.read_bytes(), other.read_bytes()
    with pytest.raises(DamageError, match=rf"{one} .* and {other} "):
        file.read(store.path / below)
    assert twice.mend(store.path) == []
    assert (one.read_bytes(), other.read_bytes()) == left
    damages = check_store(store).damages
    assert any(str(one) in damage.message and str(other) in damage.message for damage in damages)
    if file is STATE:
        assert damages[0].lost == (0, None), "nothing is known to be restorable"


def test_both_that_cannot_be_read_are_an_error_of_the_disk_and_no_missing_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    unreadable(monkeypatch, *(store.path / name for name in STORE.names))
    assert STORE.exists(store.path)
    with pytest.raises(OSError, match="Input/output error"):
        Store.open(store.path)


# --- older ones


def test_an_older_first_file_that_was_put_back_by_hand_does_not_count(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    kept = {store.path / below / name: b"" for file, below in FILES for name in file.names}
    for path in kept:
        kept[path] = path.read_bytes()
    store = store.with_bytes(0, 128 * BLOCK)
    image = Image.open(Store.open(store.path), writable=True, cut_short=True)
    image.grow(0, 128 * BLOCK)
    image.set_moving(2)
    image.set_at(2, 20)
    image.close()
    for first in (0, 1):
        for file, below in FILES:
            path = store.path / below / file.names[first]
            now = path.read_bytes()
            path.write_bytes(kept[path])
            os.utime(path)  # the newest by its time
            assert Store.open(store.path).volumes[0].bytes == 128 * BLOCK
            assert read_state(store).boundary == 2
            path.write_bytes(now)


def test_what_a_pgcdp_of_before_wrote_beside_a_copy_counts(tmp_path: Path) -> None:
    """It knows the first file alone, and keeps what it does not know in store.json."""
    store = make_store(tmp_path, 1)
    content = fsio.read_json(store.path / STORE.name)
    content["volumes"][0]["bytes"] = 128 * BLOCK
    fsio.write_json(store.path / STORE.name, content)
    fsio.write_json(store.image / STATE.name, {"state": "at", "boundary": 2, "write": 20})
    assert Store.open(store.path).volumes[0].bytes == 128 * BLOCK
    assert read_state(store).boundary == 2
    twice.mend(store.path)
    for file, below in FILES:
        assert len({(store.path / below / name).read_bytes() for name in file.names}) == 1
    assert Store.open(store.path).volumes[0].bytes == 128 * BLOCK


# --- stores of before, and places that are no store


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_store_of_before_is_whole_and_gets_its_copies(
    tmp_path: Path, request: pytest.FixtureRequest, encrypted: bool
) -> None:
    if encrypted:
        request.getfixturevalue("key")
    store = make_store(tmp_path)
    old_store(store)
    assert Store.open(store.path) == store
    assert read_state(store).boundary == 3
    assert check_store(store).ok, "nothing is missing in it"
    assert twice.mend(store.path) == [], "nor was anything damaged"
    assert all((store.path / below / name).exists() for file, below in FILES for name in file.names)
    for file, below in FILES:
        (store.path / below / file.name).unlink()
    assert Store.open(store.path) == store
    assert read_state(store).boundary == 3


def taken_up(made: World) -> None:
    """As an agent does it that starts."""
    settings = StageSettings(1, (), "optimal", 3)
    Stages.open(
        made.store, made.journal, KeepAll(), settings, make_way=MakeWay(1.0), synced=20, released=20
    ).close()  # fmt: skip


@pytest.mark.parametrize("left", ["an old store", "without the first ones", "without the copies"])
def test_an_agent_that_starts_mends_both_files(tmp_path: Path, left: str) -> None:
    made = make_world(tmp_path)
    made.store = made.store.with_baseline(boundary(0, 0))
    run_interval(made, 1, "optimal", random.Random(7), 20)
    if left == "an old store":
        old_store(made.store)
    else:
        for file, below in FILES:
            (made.store.path / below / file.names[left == "without the copies"]).unlink()
    taken_up(made)
    for file, below in FILES:
        one, other = (fsio.read_json(made.store.path / below / name) for name in file.names)
        assert one == other
        assert one[twice.MARK]
    assert read_state(made.store).boundary == 1, "it was taken for no new store"


def test_no_image_is_begun_over_a_state_of_which_only_a_damaged_copy_is_left(tmp_path: Path) -> None:
    """Before the first boundary, when the store alone does not say that there is one."""
    made = make_world(tmp_path)
    (made.store.image / STATE.name).unlink()
    flip(made.store.image / STATE.copy, 5)
    with pytest.raises(DamageError, match=STATE.copy):
        taken_up(made)


def test_an_encrypted_copy_is_sealed_and_bound_to_its_name(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    one, other = (store.image / name for name in STATE.names)
    assert b"boundary" not in other.read_bytes()
    shutil.copy(one, other)
    (found,) = check_store(store).damages
    assert found.file == other
    sealing.forget(store.path)
    with pytest.raises(PreconditionError, match="was not opened with a key"):
        read_state(store)


def test_a_wrong_key_is_told_as_one_when_a_copy_is_damaged(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    flip(store.path / STORE.name, 5)
    flip(store.image / STATE.copy, 50)
    assert key.file is not None
    sealing.forget(store.path)
    key.file.write_text("ab" * 32)
    with pytest.raises(PreconditionError, match="is not that of the store"):
        Store.open(store.path)


@pytest.mark.parametrize("left", STORE.names)
def test_a_place_with_one_of_both_is_a_store_and_never_taken_for_empty(tmp_path: Path, left: str) -> None:
    store = make_store(tmp_path, 0)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(store.path / left, fresh)
    assert STORE.exists(fresh)
    with pytest.raises(PreconditionError, match=f"{fresh} is the store of "):
        check_places(ProtectRequest("t", tmp_path / "data", fresh), [tmp_path / "data"], tmp_path / "journal")
    assert Store.open(fresh).set_id == SET_ID
    with pytest.raises(PreconditionError, match="is not an empty directory"):
        Store.create(fresh, "s", bytes(16), [Volume(0, "data", BLOCK)])
    assert not STORE.exists(tmp_path)
    assert not STORE.exists(store.path / left / "below"), "below a file there is nothing"


def test_an_image_given_up_is_given_up_twice(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0)
    STATE.remove(store.image)
    assert not STATE.exists(store.image)
    assert twice.mend(store.path) == []
    assert not STATE.exists(store.image), "nothing brings it back"
