"""Any write can be restored, byte for byte: against a model that knows FORMAT.md and nothing of pgcdp."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pgcdp.intervals.increments import Mode
from pgcdp.records import Target
from pgcdp.recovery import restore
from pgcdp.recovery.source import Source
from pgcdp.store.image_lock import image_held
from tests.fix_engine import MakeCapture
from tests.model import Write, put_extents, read_journal, read_store, replay
from tests.raw_workload import assert_history
from tests.stage_history import VOLUMES, History, restored


class States:
    """The volumes at rising write numbers, by replay from the baseline."""

    def __init__(self, baseline: list[bytes], writes: list[Write]) -> None:
        self._volumes = [bytearray(volume) for volume in baseline]
        self._writes = writes
        self._done = 0

    def at(self, write: int) -> list[bytearray]:
        """The volumes after `write`; write numbers must not fall from call to call."""
        self._volumes = replay(self._volumes, self._writes[self._done : write], write)
        self._done = write
        return self._volumes


def assert_restores(history: History, source: Source, points: list[int], place: Path) -> None:
    """Each point restored by pgcdp equals the model's replay of the journal."""
    writes = read_journal(history.capture.journal).writes
    states = States(history.baseline_bytes(), writes)
    for write in sorted(set(points)):
        target = place / f"at-{write}"
        restore.to_image(source, source.resolve(Target("write", write)), target)
        for name, found, expected in zip(VOLUMES, restored(target, VOLUMES), states.at(write), strict=True):
            assert found == expected, f"volume {name} at write {write}"


def run_history(make_capture: MakeCapture, seed: int, mode: Mode, intervals: int, writes: int) -> History:
    capture = make_capture(VOLUMES, journal_limit=4 << 30)
    capture.start()
    history = History(capture, seed, mode)
    history.work.start()
    history.work.wait_answered(50)
    history.baseline()
    history.run(intervals, writes)
    history.work.finish()
    return history


def check_history(history: History, place: Path, count: int, seed: int) -> None:
    """All that item 2 of 'What must be shown' asks, on one history."""
    rng = random.Random(seed)
    status = history.engine.status()
    source = Source(history.store, history.journal, status.durable_write)
    base, newest = source.base(), status.durable_write
    boundaries = [interval.to_write for interval in source.intervals()]
    points = [base.write, newest, *boundaries[:3], *(boundary + 1 for boundary in boundaries[:3] if boundary < newest)]
    points += [rng.randint(base.write, newest) for _ in range(max(0, count - len(points)))]
    assert_restores(history, source, points, place)

    stored = read_store(history.store.path)
    writes = read_journal(history.capture.journal).writes
    states = States(history.baseline_bytes(), writes)
    before = [bytearray(volume) for volume in states.at(base.write)]
    for number, interval in stored.intervals.items():
        put_extents(before, interval.forward_map, interval.data)
        after = states.at(interval.writes[-1].number)
        assert before == after, f"image {number - 1} with forward increment {number} is not image {number}"
        back = [bytearray(volume) for volume in after]
        put_extents(back, interval.backward_map, interval.backward)
        earlier = replay(history.baseline_bytes(), writes, interval.writes[0].number - 1)
        assert back == earlier, f"image {number} with backward increment {number} is not image {number - 1}"
    assert stored.image() == before, "the image is not at the newest boundary"
    assert_history(history.work.ops, [write for write in writes if write.volume != 2])


@pytest.mark.parametrize("mode", ["optimal", "replay"])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_write_restores_byte_for_byte(make_capture: MakeCapture, scratch: Path, seed: int, mode: Mode) -> None:
    history = run_history(make_capture, seed, mode, intervals=5, writes=120)
    check_history(history, scratch, 12, seed)
    history.stages.close()


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["optimal", "replay"])
@pytest.mark.parametrize("seed", range(100, 106))
def test_any_write_of_long_histories(make_capture: MakeCapture, scratch: Path, seed: int, mode: Mode) -> None:
    history = run_history(make_capture, seed, mode, intervals=40, writes=300)
    check_history(history, scratch, 60, seed)
    history.stages.close()


def test_a_store_alone_restores_up_to_its_newest_boundary(make_capture: MakeCapture, scratch: Path) -> None:
    history = run_history(make_capture, 3, "optimal", intervals=3, writes=80)
    alone = Source(history.store)
    boundary = alone.intervals()[-1].to_write
    history.stages.close()
    assert_restores(history, alone, [alone.base().write, boundary - 1, boundary], scratch)


def test_the_open_interval_survives_a_restart_of_the_agent(make_capture: MakeCapture, scratch: Path) -> None:
    """Stages closed and opened again in the middle of an interval, and after a boundary was named but not published."""
    capture = make_capture(VOLUMES, journal_limit=4 << 30)
    capture.start()
    history = History(capture, 4)
    history.work.start()
    history.baseline()
    for _ in range(3):
        history.run(1, 60)
        history.stages.relieve()
        history.stages.close()
        history.stages = history.open_stages()
    history.run(1, 60)
    history.work.finish()
    check_history(history, scratch, 10, 4)
    history.stages.close()


def test_a_long_restore_holds_up_neither_capture_nor_the_store(make_capture: MakeCapture, scratch: Path) -> None:
    """While the image is read it stays; writes go on into the store and the journal is freed all the same."""
    capture = make_capture(VOLUMES, journal_limit=4 << 30)
    capture.start()
    history = History(capture, 5)
    history.work.start()
    history.baseline()
    with image_held(history.store):
        history.run(3, 60)
        assert history.stages.image.state.boundary == 0, "the image moved under its reader"
        assert history.store.interval_numbers() == [1]
        history.stages.relieve()
        assert history.stages.opened is not None
        assert history.stages.opened.synced_write > history.store_boundary()
    history.run(2, 60)
    assert history.stages.image.state.boundary == 3
    history.work.finish()
    check_history(history, scratch, 8, 5)
    history.stages.close()
