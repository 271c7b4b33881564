"""The directories of clones: none is removed that somebody works on, that was made anew, or that is of this boot."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp import cloning
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.fsio import write_json
from pgcdp.records import RecoveryPoint
from pgcdp.recovery import clone as cloned
from pgcdp.recovery import clone_opening, places
from pgcdp.recovery.clone import Access, Clone


@pytest.fixture
def below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cloned, "PLACES", tmp_path)
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


def test_a_look_at_a_clone_is_in_nobodys_way_but_a_command_is(below: Path) -> None:
    clone = made(below, "one")
    fd = places.lock(clone.place)
    with pytest.raises(PreconditionError, match="another command is working on clone one"):
        cloned.destroy(clone.place)
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


def test_a_name_is_free_that_no_root_has_used(below: Path) -> None:
    other = made(below, "main-1", root="/another")
    assert cloning._free_name(Path("/root"), below, "main") == "main-2"
    assert "PGCDP_ROOT=/another" in str(clone_opening._taken(replace(other, root=Path("/root"))))
