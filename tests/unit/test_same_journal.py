"""A set takes no other journal than the one that it was captured with last: an older one would be replayed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pgcdp.capture import renewing, same_journal
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
            SimpleNamespace(name="main", journal=root / "journal", store=root, set_id_bytes=SET_ID, paths=paths),
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
        same_journal.note(self.config)
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
        same_journal.refuse_other(made.config)
    assert str(made.root / "state/journal.json") in str(told.value.hint)


def test_the_newest_one_is_taken(made: Set) -> None:
    same_journal.refuse_other(made.config)  # nothing is known of any yet
    newest = made.stop()
    made.bring_back(newest)
    same_journal.refuse_other(made.config)
    made.work()
    same_journal.refuse_other(made.config)


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
    same_journal.refuse_other(made.config)
    made.bring_back(older)
    for _ in range(9):
        made.work()
    refused(made, "it is another one")


def test_one_without_identity_is_refused(made: Set) -> None:
    made.stop()
    (made.root / "journal/journal.json").unlink()
    refused(made, "it is another one")


@pytest.mark.parametrize("change", [renewing.begin_anew, lambda config, behind: same_journal.forget(config.paths)])
def test_what_is_to_be_taken_is(made: Set, change: Callable[[Config, int], object]) -> None:
    """A journal that just began anew, though nobody came to note it; and whichever there is after a take-over."""
    older = made.stop()
    made.work()
    made.stop()
    change(made.config, 1)
    same_journal.refuse_other(made.config)
    if change is not renewing.begin_anew:
        made.bring_back(older)
        same_journal.refuse_other(made.config)


def test_a_damaged_slot_makes_no_older_copy(made: Set) -> None:
    """The one before it counts, as after a torn write; two steps back is no accident of that."""
    made.stop()
    applied = made.root / "journal/applied"
    raw = bytearray(applied.read_bytes())
    raw[made.sequence % 2 * MARK_BYTES] ^= 1
    applied.write_bytes(raw)
    same_journal.refuse_other(made.config)
    made.sequence -= 3
    made.work()
    raw = bytearray(applied.read_bytes())
    raw[(made.sequence + 1) % 2 * MARK_BYTES] ^= 1
    applied.write_bytes(raw)
    refused(made, "it is an older copy")
