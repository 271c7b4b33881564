"""kill -9 of the agent's work in the middle of everything: it goes on and ends with the same bytes.

Without Postgres, so that it can be killed often (tests/follower.py). At the end the store must be what the model, which
reads FORMAT.md alone, makes of the journal, and image and sums must be those of a follower that nobody disturbed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgcdp.intervals.increments import Mode
from pgcdp.store.layout import Store
from tests.fix_engine import Capture, MakeCapture
from tests.follower import STEPS, Killable
from tests.model import put_extents, read_journal, read_store, replay
from tests.raw_workload import Workload
from tests.results import keep_result
from tests.stage_history import VOLUMES
from tests.waiting import wait_until

KILLED = -9


@contextmanager
def followed(
    make_capture: MakeCapture, seed: int, mode: Mode, *, pause: float = 0.0
) -> Iterator[tuple[Capture, Workload, Killable]]:
    """A capture under load with a follower that has not begun. `pause`: of a writer, as Workload has it."""
    capture = make_capture(VOLUMES, journal_limit=4 << 30)
    capture.start()
    work = Workload(
        [capture.device("data"), capture.device("wal")],
        seed=seed, pause=pause, mark=lambda name: capture.request("mark", name=name),
    )  # fmt: skip
    work.start()
    try:
        work.wait_answered(50)
        with Killable(capture, "store", mode) as follower:
            yield capture, work, follower
    finally:
        work.finish()


def assert_same_end(capture: Capture, work: Workload, follower: Killable) -> int:
    """The follower ends undisturbed, and so does a fresh one; both against each other and the model. Intervals."""
    work.finish()
    assert follower.run(checkpoints=False)[0] == 0
    with Killable(capture, "undisturbed", "optimal") as other:
        assert other.run(checkpoints=False)[0] == 0
    assert follower.run(checkpoints=False)[0] == 0
    for file in sorted((other.store / "image").glob("*.*s")) + sorted((other.store / "image").glob("*.img")):
        assert (follower.store / "image" / file.name).read_bytes() == file.read_bytes(), file.name
    return assert_model(capture, follower.store)


def assert_model(capture: Capture, path: Path) -> int:
    """Every interval of the store is what the journal says: writes, both increments, the image. Number of them."""
    writes = read_journal(capture.journal).writes
    stored = read_store(path)
    states = [bytearray(capture.baseline(name).read_bytes()) for name in VOLUMES]
    done = 0
    volumes: list[bytearray] | None = None
    for number, interval in stored.intervals.items():
        first, last = interval.writes[0].number, interval.writes[-1].number
        states = replay(states, writes[done : first - 1], first - 1)
        assert volumes is None or volumes == states, f"image {number - 1} by increments"
        assert interval.writes == writes[first - 1 : last], f"writes of interval {number}"
        volumes = [bytearray(volume) for volume in states]
        put_extents(volumes, interval.forward_map, interval.data)
        after = replay(states, writes[first - 1 : last], last)
        assert volumes == after, f"forward increment {number}"
        back = [bytearray(volume) for volume in after]
        put_extents(back, interval.backward_map, interval.backward)
        assert back == states, f"backward increment {number}"
        states, done = after, last
    assert stored.image() == states, "the image"
    return len(stored.intervals)


@pytest.mark.parametrize("mode", ["optimal", "replay"])
def test_killed_at_every_named_step(make_capture: MakeCapture, mode: Mode) -> None:
    with followed(make_capture, 11, mode) as (capture, work, follower):
        for number, step in enumerate(STEPS):
            for times in (1, 3) if not step.startswith(("baseline", "boundary 0")) else (1,):
                code, _ = follower.run(seed=number, turns=200, step=step, times=times)
                assert code == KILLED, f"the step was never reached: {step}"
        assert assert_same_end(capture, work, follower) >= 5


def test_killed_between_naming_boundary_0_and_reaching_it(make_capture: MakeCapture) -> None:
    """The image must stop at the write that is named, however much was applied to the volumes meanwhile."""
    with followed(make_capture, 12, "optimal") as (capture, work, follower):
        assert follower.run(step="boundary 0 named", turns=5)[0] == KILLED
        named = Store.open(follower.store).baseline
        assert named is not None
        work.wait_answered(work.answered + 200)
        wait_until(lambda: capture.request("sync")["applied_write"] > named.write + 100, what="writes on the volumes")
        assert assert_same_end(capture, work, follower) >= 1


def kill_often(make_capture: MakeCapture, seed: int, mode: Mode, kills: int) -> dict[str, object]:
    """Half of the kills at the n-th changing system call, half after a random time."""
    rng = random.Random(seed)
    killed = 0
    with followed(make_capture, seed, mode) as (capture, work, follower):
        for number in range(kills):
            if number == kills // 3:  # until here the first image was copied again and again
                assert follower.run(turns=1)[0] == 0
            if number % 2:
                code, _ = follower.run(seed=rng.getrandbits(32), turns=60, at_call=rng.randint(1, 120))
            else:
                code, _ = follower.run(seed=rng.getrandbits(32), turns=60, seconds=rng.random() * 0.3)
            assert code in (0, KILLED)
            killed += code == KILLED
        intervals = assert_same_end(capture, work, follower)
    return {"seed": seed, "mode": mode, "kills": killed, "intervals": intervals}


@pytest.mark.parametrize("mode", ["optimal", "replay"])
def test_killed_at_random_moments(make_capture: MakeCapture, mode: Mode) -> None:
    found = kill_often(make_capture, 21, mode, 24)
    assert int(str(found["kills"])) >= 12


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["optimal", "replay"])
def test_killed_very_often(make_capture: MakeCapture, mode: Mode) -> None:
    rows = [kill_often(make_capture, 300 + seed, mode, 120) for seed in range(5)]
    keep_result(f"killed-agent-{mode}", rows)
    assert sum(int(str(row["kills"])) for row in rows) >= 300


def test_killed_at_each_call_of_closing_an_interval(make_capture: MakeCapture) -> None:
    """One system call further each time, so that each of them is the last one once."""
    with followed(make_capture, 31, "optimal") as (capture, work, follower):
        assert follower.run(turns=3)[0] == 0
        reached = 0
        for call in range(1, 60):
            code, _ = follower.run(seed=call, turns=2, at_call=call)
            reached += code == KILLED
        assert reached >= 20
        assert assert_same_end(capture, work, follower) >= 3
