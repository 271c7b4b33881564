"""A journal that begins anew behind what the store has: durably, or as it was, and harmless when done again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pgcdp.capture import renewing
from pgcdp.capture.control import EngineStatus, Tracked
from pgcdp.capture.journal import AppliedMark, Journal, Tracking
from pgcdp.config import Config
from pgcdp.errors import DamageError
from pgcdp.records import Position
from tests.faults.points import python_points
from tests.faults.service import Faults
from tests.journal_writer import MARK, JournalWriter, Op

SET_ID = bytes(range(16))


def settings(journal: Path) -> Config:
    paths = SimpleNamespace(state=journal.parent / "state")
    return cast(Config, SimpleNamespace(journal=journal, set_id_bytes=SET_ID, paths=paths))


def stopped(directory: Path, *, clean: bool = True) -> Config:
    """Twelve writes in three segments, seven of them released; the bitmap of changed blocks is there."""
    directory.mkdir(parents=True)
    writer = JournalWriter(directory, SET_ID)
    for number in range(12):
        if number in (4, 8):
            writer.new_segment()
        writer.append([Op(MARK, data=b"%d" % number)])
    writer.mark(12, 7, 12, clean=clean)
    (directory / "tracked").write_bytes(b"of another order")
    return settings(directory)


def mark_of(config: Config) -> AppliedMark:
    mark = Journal(config.journal, SET_ID).applied_mark()
    assert mark is not None
    return mark


def assert_anew(config: Config, behind: int) -> None:
    """It holds nothing, and what comes next has a number and a segment that nobody has seen."""
    mark = mark_of(config)
    assert (mark.clean, mark.applied_write, mark.released_write, mark.durable_write) == (True, behind, behind, behind)
    assert mark.position.segment >= 3
    journal = Journal(config.journal, SET_ID)
    assert journal.segments() == []
    assert journal.last_write(behind) == behind
    assert renewing.unreadable(config) is None
    assert not (config.journal / "tracked").exists()


def test_a_journal_begins_anew_and_its_segments_are_kept(tmp_path: Path) -> None:
    config = stopped(tmp_path / "journal")
    files = {path.name: path.read_bytes() for path in config.journal.glob("*.seg")}
    aside = renewing.begin_anew(config, 9)
    assert aside == config.journal / "lost-00000000000000000010"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == files
    assert_anew(config, 9)


@pytest.mark.parametrize("what", ["a segment", "all segments", "a byte", "the end"])
def test_what_is_lost_of_a_journal_is_told(tmp_path: Path, what: str) -> None:
    config = stopped(tmp_path / "journal")
    assert renewing.unreadable(config) is None
    for number in {"a segment": (2,), "all segments": (1, 2, 3), "the end": (3,)}.get(what, ()):
        (config.journal / f"{number:016d}.seg").unlink()
    if what == "a byte":
        file = config.journal / f"{3:016d}.seg"
        raw = bytearray(file.read_bytes())
        raw[4096 + 100] ^= 1
        file.write_bytes(raw)
    told = renewing.unreadable(config)
    assert told is not None
    assert str(config.journal) in told
    renewing.begin_anew(config, 8)
    assert_anew(config, 8)


def test_what_was_not_stopped_in_order_does_not_begin_anew(tmp_path: Path) -> None:
    """Its volumes may lack what it holds."""
    config = stopped(tmp_path / "journal", clean=False)
    before = {path: path.read_bytes() for path in config.journal.iterdir()}
    with pytest.raises(DamageError, match="stopped in order"):
        renewing.begin_anew(config, 9)
    (config.journal / "applied").unlink()
    with pytest.raises(DamageError, match="stopped in order"):
        renewing.begin_anew(config, 9)
    assert {path: path.read_bytes() for path in config.journal.iterdir()}.items() <= before.items()


def test_each_step_on_a_failing_disk(tmp_path: Path, failing: Faults) -> None:
    """Whatever it leaves, the next number is one that no segment had, and done again it is whole."""
    ours = ("capture.renewing.begin_anew.", "capture.journal.write_mark.")
    came = set()
    for point in sorted(name for name in python_points() if name.startswith(ours)):
        for skip in count():
            config = stopped(tmp_path / f"{point}-{skip}")
            failing.set(point, "eio", skip=skip)
            with suppress(OSError):
                renewing.begin_anew(config, 9)
            failing.clear(point)
            mark = mark_of(config)
            assert mark.durable_write in (9, 12)
            assert mark.position.segment >= 3
            assert not (mark.durable_write == 9 and Journal(config.journal, SET_ID).segments()), "never both"
            fired = failing.fired(point)
            renewing.begin_anew(config, 9)
            assert_anew(config, 9)
            came.update(fired)
            if not fired:
                break
    assert {name.rpartition(".")[2] for name in came} >= {"pwrite", "fsync", "rename", "unlink", "mkdir"}


@pytest.mark.parametrize(
    ("synced", "there", "tracks"), [(12, True, True), (12, False, False), (12, False, True), (11, False, True)]
)
def test_a_mark_that_was_removed_while_the_set_ran_is_written_again(
    tmp_path: Path, synced: int, there: bool, tracks: bool
) -> None:
    """But only of what capture said to be on the volumes; and one that is there counts. What was tracked is in it."""
    config = stopped(tmp_path / "journal", clean=False)
    before = mark_of(config)
    if not there:
        (config.journal / "applied").unlink()
    told: Any = SimpleNamespace(
        durable_write=12, released_write=7, position=Position(3, 12288), raw={"batch": 12},
        tracked=Tracked(12, 1000, 3, False) if tracks else None,
    )  # fmt: skip
    renewing.mark_again(config, cast(EngineStatus, told), synced)
    found = Journal(config.journal, SET_ID).applied_mark()
    if there:
        assert found == before
    elif synced < 12:
        assert found is None
    else:
        tracking = Tracking(1, 1000, 12, 0) if tracks else None
        assert found == replace(before, sequence=0, clean=True, position=Position(3, 12288), tracking=tracking)
