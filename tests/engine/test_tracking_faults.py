"""on_full = track: what is said, and done again, when bitmap or volumes cannot be written meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from tests.engine.test_tracking import (
    GAP_END,
    IDLE,
    SMALL,
    Keeper,
    assert_one_gap,
    assert_volumes_equal_writes,
    state,
    writing,
)
from tests.faults.service import Faults
from tests.faults.tracking import points_of_a_new_bitmap
from tests.fix_engine import BLOCK, MIB, Capture, Direct
from tests.model import Wrong, read_journal, read_tracked
from tests.waiting import pass_time, wait_until

TRACK_AFTER_SECONDS = 3


@pytest.fixture
def capture(faulty_engine: Path, faults: Faults, scratch: Path) -> Iterator[Capture]:
    """Started, with fault points."""
    made = Capture(faulty_engine, scratch / "faulty", {"data": 16 * MIB}, **{**SMALL, "journal_limit": 128 * MIB})
    made.start()
    yield made
    made.kill()


def track(capture: Capture, faults: Faults) -> None:
    """The journal takes nothing more, and one write is tracked."""
    faults.set("journal.batch.sync", "eio", times=0)
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"2" * BLOCK)
    assert state(capture) == "tracking"


def heal(capture: Capture, faults: Faults) -> None:
    """The journal is well again, and gets what it lacks."""
    faults.clear("journal.batch.sync")
    wait_until(lambda: "error" not in capture.request("heal"), what="room")


def has_ended(capture: Capture) -> bool:
    """Whether the end record of the gap is durable."""
    durable = capture.status()["durable_write"]
    with suppress(FileNotFoundError, Wrong):  # it is being written to
        return any((w.number, w.flags) == (durable, GAP_END) for w in read_journal(capture.journal).writes)
    return False


@pytest.mark.parametrize("point", ["journal.mark.write", "tracked.state.write"])
def test_since_when_writes_are_missing_outlives_a_state_that_was_not_written(
    capture: Capture, faults: Faults, point: str
) -> None:
    """Else no time before the gap's end could be a target any more."""
    keeper = Keeper(capture)
    before = time.time_ns()
    faults.set(point, "eio")
    track(capture, faults)
    assert faults.fired(point)
    since = capture.status()["tracked"]["since_ns"]
    assert before <= since <= time.time_ns()
    heal(capture, faults)
    wait_until(lambda: state(capture) == "capturing", what="healing")
    keeper.take()
    assert [each.data.decode() for each in keeper.gaps()] == [f"untracked {since}"] * 2
    assert capture.stop() == 0


@pytest.mark.parametrize("point", ["tracked.bits.sync", "tracked.state.write"])
def test_the_end_of_a_gap_needs_no_other_write(capture: Capture, faults: Faults, point: str) -> None:
    """Nobody may write for hours: the set would heal that long, with its marks and cuts refused."""
    keeper = Keeper(capture)
    track(capture, faults)
    faults.set(point, "eio", skip=2 if point == "tracked.state.write" else 0, times=0)  # both slots say healing
    heal(capture, faults)
    wait_until(lambda: any("bitmap" in each for each in capture.status()["errors"]), what="its failure")
    wait_until(lambda: has_ended(capture), what="its end record")  # bits may be written, and fail, before that
    end = capture.status()["durable_write"]
    assert capture.status()["tracked"]["since_ns"] > 0
    faults.clear(point)
    wait_until(lambda: state(capture) == "capturing", timeout=20, what="the end, with nothing written")
    assert capture.status()["durable_write"] == end
    assert capture.status()["errors"] == []
    assert read_tracked(capture.journal / "tracked").state == IDLE
    keeper.take()
    assert_one_gap(keeper)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_a_slow_disk_does_not_look_like_a_clock_that_was_set(capture: Capture, faults: Faults) -> None:
    """The begin record's two clocks are of one moment, however long it takes until that is noted."""
    keeper = Keeper(capture)
    track(capture, faults)
    faults.set("tracked.state.sync", "slow", milliseconds=1500)
    heal(capture, faults)
    wait_until(lambda: state(capture) == "capturing", what="healing")
    assert faults.fired("tracked.state.sync")
    keeper.take()
    apart = [write.wall_ns - write.boot_ns for write in keeper.writes.values()]
    assert max(apart) - min(apart) < 1_000_000_000
    assert capture.stop() == 0


def test_no_gap_begins_on_a_volume_that_lacks_what_it_had(capture: Capture, faults: Faults) -> None:
    """What is tracked is in memory and on the volumes alone: nothing could tell it from what a failed sync lost."""
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"1" * MIB)
        wait_until(lambda: capture.status()["unapplied_bytes"] == 0, what="it is on the volume")
        faults.set("volume.replay.sync", "lost", times=0)
        faults.set("volume.sync", "lost")
        wait_until(lambda: faults.fired("volume.replay.sync"), what="the failed sync, and a try to write it again")
        faults.set("journal.batch.sync", "eio", times=0)
        writing = Thread(target=lambda: volume.write(0, b"2" * BLOCK))
        writing.start()
        pass_time(TRACK_AFTER_SECONDS + 2)
        assert state(capture) == "stalled"
        faults.clear("volume.replay.sync")
        writing.join(30)
        assert not writing.is_alive()
        assert state(capture) == "tracking"
        heal(capture, faults)
        wait_until(lambda: state(capture) == "capturing", what="healing")
        assert volume.read(0, 2 * BLOCK) == b"2" * BLOCK + b"1" * BLOCK
    assert capture.stop() == 0


@pytest.mark.parametrize("point", [each for each in points_of_a_new_bitmap() if "directory" not in each])
def test_a_start_without_a_bitmap_captures_as_ever(
    faulty_engine: Path, faults: Faults, scratch: Path, point: str
) -> None:
    """Production waits for it, and nothing was tracked; the next start makes it."""
    made = Capture(faulty_engine, scratch / "new", {"data": 8 * MIB}, **SMALL)
    faults.set("tracked.new.sync" if point.endswith("unlink") else point, "eio", times=0)  # what comes by the latter
    faults.set(point, "eio", times=0)
    try:
        made.start()
        assert faults.fired(point)
        assert made.status()["on_full"] == "stall"
        with Direct(made.device("data")) as volume:
            volume.write(0, b"1" * BLOCK)
        assert made.stop() == 0
        faults.clear_all()
        made.start()
        assert made.status()["on_full"] == "track"
        assert made.stop() == 0
    finally:
        made.kill()


def test_a_bitmap_has_its_name_durably_before_anything_is_tracked(
    faulty_engine: Path, faults: Faults, scratch: Path
) -> None:
    """Else a power cut would leave a journal without one, and the volumes with what it lacks."""
    made = Capture(faulty_engine, scratch / "new", {"data": 8 * MIB}, **{**SMALL, "journal_limit": 128 * MIB})
    faults.set("tracked.new.directory", "eio")
    faults.set("tracked.state.directory", "eio", times=0)
    try:
        made.start()
        assert faults.fired("tracked.new.directory")
        faults.set("journal.batch.sync", "eio", times=0)
        with writing(made, b"1" * BLOCK) as answered:
            wait_until(lambda: len(faults.fired("tracked.state.directory")) > 1, timeout=60, what="its sync")
            assert not answered.is_set()
            faults.clear("tracked.state.directory")
        assert state(made) == "tracking"
        heal(made, faults)
        wait_until(lambda: state(made) == "capturing", what="healing")
        assert made.stop() == 0
    finally:
        made.kill()


@pytest.mark.parametrize("times", [1, 0])
def test_what_a_failed_sync_lost_of_a_tracked_write_is_written_again(
    capture: Capture, faults: Faults, times: int
) -> None:
    """It is in no journal: it is answered when the volume has it, and not before."""
    track(capture, faults)
    faults.set("volume.tracked.sync", "lost", times=times)
    with writing(capture, b"3" * BLOCK) as answered:
        wait_until(lambda: bool(faults.fired("volume.tracked.sync")), what="the failed sync")
        if times == 0:
            wait_until(lambda: any("written again" in each for each in capture.status()["errors"]), what="a word of it")
            wait_until(lambda: state(capture) == "stalled", what="that the write waits")
            assert not answered.is_set()
            faults.clear("volume.tracked.sync")
    assert capture.backing("data").read_bytes()[:BLOCK] == b"3" * BLOCK
    wait_until(lambda: not any("volume" in each for each in capture.status()["errors"]), what="that it is over")
    capture.kill()
    faults.clear_all()
    capture.start()
    keeper = Keeper(capture)
    heal(capture, faults)
    wait_until(lambda: state(capture) == "capturing", what="healing")
    keeper.take()
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)
