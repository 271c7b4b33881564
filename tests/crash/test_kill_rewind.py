"""kill -9 of the command, the agent, the engine, Postgres at random moments of a rewind in place: it is finished or put
back.

After each: `up` leaves production at the target or where it was, with every row of the one or the other and no other;
nothing is mounted by anything else meanwhile; and from there it can be rewound again.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from pgcdp import api, rewinding
from pgcdp.capture import attach, held, volumes
from pgcdp.errors import PreconditionError
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Target
from pgcdp.service import AgentGone
from tests.crash.test_kill_set import ALLOWED
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet, first_difference
from tests.results import keep_result
from tests.waiting import pass_time, wait_until

ROWS = {"before": 3000, "behind": 6000}
STEPS = ("stop", "write", "start", "run")
VICTIMS = (
    ("command",), ("command", "agent"), ("command", "agent", "engine"), ("engine",), ("postgres",),
    ("command", "agent", "engine", "postgres"),
)  # fmt: skip
START = r"FATAL:  (configuration file .* contains errors|could not load .*pg_hba|.* is not a valid data directory)"
"""What Postgres says when the engine is killed just as it starts, or as the first one connects."""


def start_rewind(found: ProtectedSet, target: Target) -> subprocess.Popen[bytes]:
    place = target.name or str(target.value)
    return start_command(found, "restore", found.name, f"--target-{target.kind}", place, "--in-place", "--yes")


def start_command(found: ProtectedSet, *words: str) -> subprocess.Popen[bytes]:
    """A command of pgcdp beside the test; what it says is in the set's command.log."""
    code = "import sys; from pgcdp.cli.main import main; sys.exit(main(sys.argv[1:]))"
    with (found.root / "command.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-P", "-c", code, *words], stdout=log, stderr=log, cwd="/")


def step_of(found: ProtectedSet) -> str | None:
    left = rewinding.pending(found.config.paths)
    return None if left is None else left.step


def kill(found: ProtectedSet, command: subprocess.Popen[bytes], victims: tuple[str, ...]) -> None:
    pids = []
    if "agent" in victims:
        with suppress(AgentGone):
            pids.append(found.agent_pid())
    if "postgres" in victims:
        pids += cluster.find_processes(found.pgdata)
    if "command" in victims:
        command.send_signal(signal.SIGKILL)
    if "engine" in victims:
        held.cut_off(found.config.paths)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        attach.kill_and_wait(pid)


def kill_when(
    found: ProtectedSet, command: subprocess.Popen[bytes], victims: tuple[str, ...], reached: Callable[[], bool],
    what: str, later: float,
) -> None:  # fmt: skip
    """Kill `later` seconds after `reached`, or after the command's end if that comes first; the command has ended."""
    try:
        wait_until(lambda: reached() or command.poll() is not None, timeout=120, what=what)
        pass_time(later)
        kill(found, command, victims)
        command.wait(timeout=300)
    finally:
        if command.poll() is None:
            command.kill()
            command.wait()


def rows(found: ProtectedSet) -> int:
    """How many rows there are; all of them whole, in table and index."""
    ((count, total),) = found.sql("select count(*), sum(length(filler)) from ledger")
    assert total == 1000 * count
    ((indexed,),) = found.sql("select count(*) from (select n from ledger where n > 0 order by n) found")
    assert indexed == count
    return int(count)


def kill_round(
    found: ProtectedSet, chooser: random.Random, step: str, victims: tuple[str, ...], target: Target, goal: int
) -> dict[str, Any]:
    """One rewind to where there are `goal` rows, killed; then `up`, and again until it is there."""
    here = rows(found)
    timeline = cluster.read_control(found.pgdata).timeline
    command = start_rewind(found, target)
    later = chooser.random() * chooser.choice([0.01, 0.1, 0.4])
    kill_when(found, command, victims, lambda: step_of(found) == step, f"step {step}", later)
    left = step_of(found)
    if left is not None:
        with pytest.raises(PreconditionError, match="a rewind in place"):
            attach.up(found.config)
    if left == "write":
        assert all(volumes.mount_at(volume.mountpoint) is None for volume in found.config.volumes)
        assert cluster.find_postmaster(found.pgdata) is None
    found.up()
    found.wait_following()
    assert step_of(found) is None
    assert rows(found) == (here if left == "stop" else goal) or left is None
    if rows(found) != goal:
        api.rewind(found.name, target, agree=lambda resolved: None)
    assert rows(found) == goal
    assert cluster.read_control(found.pgdata).timeline > timeline
    found.amcheck()
    return {"step": step, "killed": list(victims), "left": left}


def make_targets(found: ProtectedSet) -> dict[int, Target]:
    """A target for each number of rows."""
    found.sql("create table ledger (n int primary key, filler text)")
    targets = {}
    for last in sorted(ROWS.values()):
        found.sql(
            f"insert into ledger select n, repeat(chr(97 + n % 26), 1000) from generate_series({last - 2999}, {last}) n"
        )
        found.sql(f"update ledger set filler = reverse(filler) where n > {last - 3000}")
        targets[last] = Target("write", found.durable())
        api.cut(found.name)
    return targets


def rounds(found: ProtectedSet, count: int, seed: int) -> list[dict[str, Any]]:
    """Each step and each victim in turn, with a moment of its own."""
    chooser = random.Random(seed)
    targets = make_targets(found)
    pairs = list(itertools.product(STEPS, VICTIMS))
    chooser.shuffle(pairs)
    told = []
    for (step, victims), goal in zip(itertools.islice(itertools.cycle(pairs), count), itertools.cycle(ROWS.values())):
        told.append(kill_round(found, chooser, step, victims, targets[goal], goal))
    return told


def make(make_set: MakeSet, binaries: Binaries, fs: str = "ext4") -> ProtectedSet:
    return make_set(binaries, fs=fs, size=384 << 20, allowed=[*ALLOWED, r"the agent", START])


def test_three_kills_of_a_rewind(make_set: MakeSet, binaries_of: BindirOf) -> None:
    assert len(rounds(make(make_set, binaries_of(15)), 3, random.randrange(1 << 30))) == 3


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_another_point_takes_the_place_of_one_that_was_half_written(
    make_set: MakeSet, binaries_of: BindirOf, fs: str
) -> None:
    """What the killed one wrote must go where neither the new point nor the moment before it differ from the image."""
    found = make(make_set, binaries_of(15), fs)
    targets = make_targets(found)
    found.sql("truncate ledger")
    found.sql("insert into ledger select n, repeat('z', 1000) from generate_series(1, 5000) n")
    newest = Target("write", found.durable())
    api.cut(found.name)
    half_written = 0
    for first, then, goal in ((targets[3000], newest, 5000), (targets[6000], targets[3000], 3000)):
        half_written += half_write(found, first) is not None
        told = api.rewind(found.name, then, agree=lambda resolved: None)
        assert told["undo"]
        assert rows(found) == goal
        done = found.source().rewinds()[-1]
        assert done.end is not None
        (image,) = found.restored(Target("write", done.end))
        (wanted,) = found.restored(then)
        assert first_difference(image, wanted) is None
        for each in (image, wanted):
            each.unlink()
    assert half_written
    left = half_write(found, targets[6000])
    if left is not None:
        told = api.rewind(found.name, Target("name", name=left.mark), agree=lambda resolved: None)
        assert told["undo"] is None, "that is where production is again"
        assert rows(found) == 3000


def half_write(found: ProtectedSet, target: Target) -> rewinding.Pending | None:
    """A rewind that is killed while it writes back; None when it had ended before."""
    command = start_rewind(found, target)
    wait_until(lambda: step_of(found) == "write" or command.poll() is not None, timeout=120, what="the step write")
    begun = found.durable()
    wait_until(lambda: found.durable() > begun + 20 or step_of(found) != "write", timeout=60, what="writes of it")
    kill(found, command, ("command",))
    command.wait()
    return rewinding.pending(found.config.paths) if step_of(found) == "write" else None


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_each_step_of_a_rewind_with_each_killed(make_set: MakeSet, pg_binaries: Binaries, fs: str) -> None:
    seed = random.randrange(1 << 30)
    told = rounds(make(make_set, pg_binaries, fs), len(STEPS) * len(VICTIMS), seed)
    keep_result(f"kill-rewind-{pg_binaries.major}-{fs}", {"seed": seed, "rounds": told})
    assert {each["left"] for each in told} >= {"stop", "write", "start"}
