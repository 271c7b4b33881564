"""A set takes no other journal and no other disk than it was captured with last: an older one would be replayed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pgcdp.capture import renewing, same_parts
from pgcdp.capture.journal import MARK_BYTES, AppliedMark, write_mark
from pgcdp.config import Config
from pgcdp.errors import PreconditionError
from pgcdp.records import Position

SET_ID = bytes(range(16))


class Set:
    """A stopped one, with its journal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "journal").mkdir(parents=True)
        paths = SimpleNamespace(state=root / "state")
        self.config = cast(
            Config,
            SimpleNamespace(
                name="main", journal=root / "journal", store=root, set_id_bytes=SET_ID, paths=paths, volumes=()
            ),
        )
        self.sequence = 0
        for _ in range(3):
            self.work()

    def work(self) -> None:
        """Another mark, in the slot of the one before the last, as the engine does it."""
        self.sequence += 1
        applied = self.root / "journal/applied"
        before = applied.read_bytes() if applied.exists() else bytes(2 * MARK_BYTES)
        mark = AppliedMark(self.sequence, True, 1, 1, 1, 1, Position(1, 4096))
        write_mark(applied.parent, SET_ID, mark)
        slots = [before[:MARK_BYTES], before[MARK_BYTES:]]
        slots[self.sequence % 2] = applied.read_bytes()[:MARK_BYTES]
        applied.write_bytes(b"".join(slots))

    def stop(self) -> Path:
        """As after `down`; a copy of the journal as it is then."""
        same_parts.note(self.config)
        copy = self.root / f"copy-{len(list(self.root.iterdir()))}"
        shutil.copytree(self.root / "journal", copy)
        return copy

    def bring_back(self, copy: Path) -> None:
        shutil.rmtree(self.root / "journal")
        shutil.copytree(copy, self.root / "journal")


@pytest.fixture
def made(tmp_path: Path) -> Set:
    return Set(tmp_path / "set")


def refused(made: Set, match: str) -> None:
    with pytest.raises(PreconditionError, match=match) as told:
        same_parts.refuse_other(made.config)
    assert str(made.root / "state/parts.json") in str(told.value.hint)


def test_the_newest_one_is_taken(made: Set) -> None:
    same_parts.refuse_other(made.config)  # nothing is known of any yet
    newest = made.stop()
    made.bring_back(newest)
    same_parts.refuse_other(made.config)
    made.work()
    same_parts.refuse_other(made.config)


def test_an_older_copy_is_refused(made: Set) -> None:
    older = made.stop()
    made.work()
    made.stop()
    made.bring_back(older)
    refused(made, "it is an older copy")


def test_one_from_before_it_began_anew_is_refused(made: Set) -> None:
    """Also where its mark has come further than that of the new one."""
    older = made.stop()
    renewing.begin_anew(made.config, 1)
    made.stop()
    same_parts.refuse_other(made.config)
    made.bring_back(older)
    for _ in range(9):
        made.work()
    refused(made, "it is another one")


def test_one_without_identity_is_refused(made: Set) -> None:
    made.stop()
    (made.root / "journal/journal.json").unlink()
    refused(made, "it is another one")


@pytest.mark.parametrize("change", [renewing.begin_anew, lambda config, behind: same_parts.forget(config.paths)])
def test_what_is_to_be_taken_is(made: Set, change: Callable[[Config, int], object]) -> None:
    """A journal that just began anew, though nobody came to note it; and whichever there is after a take-over."""
    older = made.stop()
    made.work()
    made.stop()
    change(made.config, 1)
    same_parts.refuse_other(made.config)
    if change is not renewing.begin_anew:
        made.bring_back(older)
        same_parts.refuse_other(made.config)


def test_a_damaged_slot_makes_no_older_copy(made: Set) -> None:
    """The one before it counts, as after a torn write; two steps back is no accident of that."""
    made.stop()
    applied = made.root / "journal/applied"
    raw = bytearray(applied.read_bytes())
    raw[made.sequence % 2 * MARK_BYTES] ^= 1
    applied.write_bytes(raw)
    same_parts.refuse_other(made.config)
    made.sequence -= 3
    made.work()
    raw = bytearray(applied.read_bytes())
    raw[(made.sequence + 1) % 2 * MARK_BYTES] ^= 1
    applied.write_bytes(raw)
    refused(made, "it is an older copy")


def test_where_it_is_not_known_which_journal_it_is_the_engine_tells_what_is_wrong(made: Set) -> None:
    """A flipped bit in a small file must not keep production down."""
    made.stop()
    identity = made.root / "journal/journal.json"
    identity.write_bytes(identity.read_bytes().replace(b'"id"', b'"ie"'))
    same_parts.refuse_other(made.config)


def test_what_cannot_be_noted_keeps_nobody_from_capture(made: Set, caplog: pytest.LogCaptureFixture) -> None:
    """The disk of the state directory may be full just then; what was noted before holds good."""
    made.stop()
    (made.root / "state").rename(made.root / "away")
    (made.root / "state").write_bytes(b"not a directory")
    made.work()
    same_parts.note(made.config)
    assert "could not be noted" in caplog.text
    (made.root / "state").unlink()
    (made.root / "away").rename(made.root / "state")
    same_parts.refuse_other(made.config)


def disk(place: Path, fs: str, number: int) -> Path:
    """The beginning of a filesystem."""
    raw, uuid = bytearray(64 << 10), bytes([number]) * 16
    if fs == "ext4":
        raw[1024 + 0x38 : 1024 + 0x3A], raw[1024 + 0x68 : 1024 + 0x78] = b"\x53\xef", uuid
    elif fs == "xfs":
        raw[:4], raw[32:48] = b"XFSB", uuid
    place.write_bytes(raw)
    return place


@pytest.mark.parametrize("was", ["ext4", "xfs"])
def test_another_disk_in_the_place_of_a_volume_is_refused(made: Set, was: str) -> None:
    backing = disk(made.root / "backing", was, 1)
    volume = SimpleNamespace(name="data", backing=backing)
    made.config = cast(Config, SimpleNamespace(**{**vars(made.config), "volumes": (volume,)}))
    made.stop()
    same_parts.refuse_other(made.config)
    for fs, number, told in (("", 0, "no filesystem"), (was, 2, f"{was} 02020202")):
        disk(backing, fs, number)
        refused(made, f"holds {told}.*volume data of main had {was} 01010101.* it is another disk")
        same_parts.refuse_other_journal(made.config)
    backing.unlink()
    same_parts.refuse_other(made.config)  # the engine tells of it
    disk(backing, "", 0)
    same_parts.note(made.config)  # one that was taken as it is
    disk(backing, was, 1)
    same_parts.refuse_other(made.config)
