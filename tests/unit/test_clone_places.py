"""The directories of clones: none is removed that somebody works on, that was made anew, or that is of this boot."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp import cloning
from pgcdp.errors import DamageError, PreconditionError, TargetError
from pgcdp.fsio import write_json
from pgcdp.records import RecoveryPoint
from pgcdp.recovery import clone as cloned
from pgcdp.recovery import clone_opening, places
from pgcdp.recovery.clone import Access, Clone, Damaged


@pytest.fixture
def below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cloned, "PLACES", tmp_path)
    monkeypatch.setenv("PGCDP_ROOT", "/root")
    found = tmp_path / "pgcdp-0123456789ab"
    found.mkdir(mode=0o711)
    return found


def made(below: Path, name: str, *, root: str = "/root", boot: str = "", expires_ns: int | None = None) -> Clone:
    place = below / f"clone-{name}"
    place.mkdir(mode=0o711)
    return Clone(
        place, Path(root), "main", Path("/store"), RecoveryPoint(5, 1, 7), Access(), time.time_ns(), expires_ns,
        boot or cloned.boot_id(), "dbname=x",
    ).save()  # fmt: skip


def damaged(root: Path) -> list[Damaged]:
    return [each for each in cloned.find_every(root) if isinstance(each, Damaged)]


def test_what_is_read_is_what_was_written(below: Path) -> None:
    clone = made(below, "one")
    assert Clone.load(clone.place) == clone
    assert cloned.find_all(Path("/root")) == [clone]
    assert cloned.find_all(Path("/other")) == []


def test_a_record_of_another_version_hides_only_itself(below: Path) -> None:
    clone = made(below, "one")
    other = made(below, "two")
    write_json(other.place / "clone.json", {"root": "/root"})
    with pytest.raises(DamageError, match="is not understood"):
        Clone.load(other.place)
    assert cloned.find_all(Path("/root")) == [clone]
    assert [each.place for each in damaged(Path("/root"))] == [other.place]
    assert damaged(Path("/other")) == []


def spoil_nothing_there(file: Path) -> None:
    file.write_bytes(b"")


def spoil_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def spoil_root(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"/root", b"/rook"))


def spoil_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("spoil", [spoil_nothing_there, spoil_half, spoil_root, spoil_directory])
def test_a_damaged_record_hides_no_clone_and_keeps_none(below: Path, spoil: Callable[[Path], None]) -> None:
    """It is listed with its file, only taken away when it is named, and its name is not given to another."""
    clone = made(below, "main-1")
    other = made(below, "main-2")
    spoil(other.place / "clone.json")
    told = {each["name"]: each for each in cloning.clones()["clones"]}
    assert {name: each["state"] for name, each in told.items()} == {"main-1": "dead", "main-2": "damaged"}
    assert told["main-1"].keys() == told["main-2"].keys()
    assert str(other.place / "clone.json") in told["main-2"]["problem"]
    assert cloning._free_name(Path("/root"), below, "main") == "main-3"
    with pytest.raises(DamageError, match=r"clone\.json") as caught:
        cloning.find("main-2")
    assert caught.value.hint == "pgcdp destroy main-2 takes it away all the same"
    cloned.clear_dead(Path("/root"), "main")
    cloned.expire(Path("/root"))
    assert other.place.exists()
    cloning.destroy("main-2")
    assert not other.place.exists()
    assert cloned.find_every(Path("/root")) == [clone]


def test_what_a_crash_left_of_a_clone_of_a_store_alone_goes_with_the_next_set(below: Path) -> None:
    """It has no set whose `up` or agent would remove it."""
    left = replace(made(below, "left", boot="the boot before"), set_name=None).save()
    over = replace(made(below, "over", expires_ns=1), set_name=None).save()
    stays = replace(made(below, "stays"), set_name=None).save()
    cloned.clear_dead(Path("/root"), "main")
    assert cloned.find_all(Path("/root")) == [over, stays]
    cloned.expire(Path("/root"), "main")
    assert cloned.find_all(Path("/root")) == [stays]
    assert not left.place.exists()


def test_of_two_that_bear_a_name_none_is_destroyed_by_guessing(below: Path) -> None:
    elsewhere = below.with_name("pgcdp-ba9876543210")
    elsewhere.mkdir(mode=0o711)
    clone = made(below, "one")
    other = made(elsewhere, "one")
    spoil_half(other.place / "clone.json")
    with pytest.raises(TargetError, match="2 clones are called one") as caught:
        cloning.destroy("one")
    command = str(caught.value.hint).partition(": ")[2]
    subprocess.run(command.split(), check=True)
    cloning.destroy("one-2")
    assert cloned.find_every(Path("/root")) == [clone]


def test_written_is_what_the_clone_wrote_not_what_opened_it(below: Path) -> None:
    place = made(below, "one").place
    for name in ("map", "patch", "engine.log"):
        (place / name).write_bytes(bytes(1 << 20))
    assert cloned.written_bytes(place) == 0
    with (place / "data.cow").open("wb") as file:
        file.truncate(1 << 30)
        file.write(bytes(1 << 16))
    assert cloned.written_bytes(place) == 1 << 16


def test_only_the_crash_of_the_machine_lets_up_remove_a_clone(below: Path) -> None:
    """One whose engine does not answer may be stepped again; it is its user's."""
    here = made(below, "here")
    left = made(below, "left", boot="another")
    assert cloned.state(here) == "dead"
    cloned.clear_dead(Path("/root"), "other")
    assert left.place.exists()
    cloned.clear_dead(Path("/root"), "main")
    assert here.place.exists()
    assert not left.place.exists()


def test_a_clone_made_anew_is_not_expired_for_the_one_before(below: Path) -> None:
    """The list was made before; what counts is what stands there when it is locked."""
    clone = made(below, "one", expires_ns=1)
    cloned.destroy(clone.place, lambda found: found.expires_ns is None)
    assert clone.place.exists()
    cloned.expire(Path("/root"), "other")
    assert clone.place.exists()
    cloned.expire(Path("/root"), "main")
    assert not below.exists(), "with the directory, when it was the last"


def test_a_look_at_a_clone_is_in_nobodys_way_but_a_command_is(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = made(below, "one")
    fd = places.lock(clone.place)
    with pytest.raises(PreconditionError, match="another command is working on clone one"):
        cloned.destroy(clone.place)
    monkeypatch.setattr(cloned, "_GLANCE_SECONDS", 60.0)  # the timer is a thread, which may come late
    timer = threading.Timer(0.1, os.close, [fd])
    timer.start()
    cloned.destroy(clone.place)
    timer.join()
    assert not clone.place.exists()


def test_a_lock_on_what_was_removed_meanwhile_is_none(below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two destroy it at once, and it is made anew between them: the second must not take that away."""
    clone = made(below, "one")
    lock = places.lock

    def overtaken(place: Path) -> int:
        fd = lock(place)
        place.rename(below / "gone")
        made(below, "one")
        return fd

    with monkeypatch.context() as patched:
        patched.setattr(places, "lock", overtaken)
        with pytest.raises(PreconditionError, match="there is no clone one any more"):
            cloned.destroy(clone.place)
    assert clone.place.exists()


def test_what_was_killed_before_its_record_was_written_does_not_hold_its_name(below: Path) -> None:
    (below / "clone-one").mkdir()
    (below / "clone-one" / "engine.log").write_text("x")
    busy = below / "clone-two"
    busy.mkdir()
    kept = made(below, "three")
    fd = places.lock(busy)
    cloned.remove_unfinished(below)
    os.close(fd)
    assert sorted(place.name for place in below.iterdir()) == ["clone-three", "clone-two"]
    assert kept.place.exists()


def test_what_comes_and_goes_beside_a_clone_is_in_nobodys_way(below: Path) -> None:
    """Commands about other sets make and remove their directories while the clones are looked for."""
    clone = made(below, "one")
    other = below.with_name("pgcdp-ba9876543210")
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            other.mkdir()
            other.rmdir()

    busy = threading.Thread(target=come_and_go)
    busy.start()
    try:
        for _ in range(1000):
            assert cloned.find_all(Path("/root")) == [clone]
    finally:
        over.set()
        busy.join()


def test_a_name_is_free_that_no_root_has_used(below: Path) -> None:
    other = made(below, "main-1", root="/another")
    assert cloning._free_name(Path("/root"), below, "main") == "main-2"
    assert "PGCDP_ROOT=/another" in str(clone_opening._taken(replace(other, root=Path("/root"))))
