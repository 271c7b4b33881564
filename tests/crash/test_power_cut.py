"""The power goes under load, with everything on disks that lose what was not synced (tests/power_truth.py).

And the same on builds with one sync taken out: a test that would not notice is no test.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.records import Target
from pgcdp.recovery.places import place_below, scratch_of
from tests.crash.test_kill_rewind import START, make_targets, rows, start_rewind, step_of
from tests.fix_engine import ROOT
from tests.fix_postgres import BindirOf
from tests.fix_power import Disk, Machine, MakeMachine
from tests.fix_sets import KILLED, MakeSet, ProtectedSet, reap
from tests.power_truth import BROKEN, Lost, Witness, judged, rounds, under_load
from tests.results import keep_result
from tests.waiting import pass_time, wait_until

MIB = 1 << 20
SIZE = 384 * MIB
SETTINGS = {"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "32MB", "checkpoint_timeout": "30s"}
ALLOWED = [
    *KILLED,
    r"PANIC:  ",
    r"(FATAL|ERROR|WARNING):  .*(Input/output error|Read-only file system|Transport endpoint|Structure needs cleaning)",
    r"(Input/output error|Read-only file system|Errno 5|Errno 30)",
    r"FATAL:  the database system is in recovery mode",
    r"checkpoints are occurring too frequently",
    r"connection to client lost",
]
MakeTruth = Callable[..., tuple[Machine, ProtectedSet]]


@pytest.fixture
def make_truth(make_machine: MakeMachine, make_set: MakeSet, binaries_of: BindirOf) -> Iterator[MakeTruth]:
    """make_truth(apart=True, fs="ext4"): a set on a machine, with everything on one disk or each part on its own."""
    machines: list[Machine] = []

    def make(*, apart: bool, fs: str = "ext4", allowed: list[str] | None = None) -> tuple[Machine, ProtectedSet]:
        tear = 4096 if fs == "xfs" else 512
        system = Disk("system", (1 << 30) if apart else (12 << 30), fs)
        others = (Disk("journal", 512 * MIB, fs), Disk("store", 8 << 30, fs), Disk("volume", SIZE, None))
        machine = make_machine(system, *(others if apart else ()), tear=tear)
        machines.append(machine)
        options: dict[str, Any] = {"size": SIZE}
        if apart:
            options = {
                "size": None,
                "volume": machine.device("volume"),
                "journal": machine.place("journal") / "main",
                "store_at": machine.place("store") / "main",
            }
        found = make_set(
            binaries_of(15), below=machine.place("system"), settings=SETTINGS, allowed=allowed or ALLOWED,
            cut=("1s",), journal_limit=256 * MIB, segment_size=8 * MIB, fs=fs, **options,
        )  # fmt: skip
        found.pgbench("-i", "-q", "-s", "2")
        return machine, found

    yield make
    for machine in machines:
        if machine.dead:  # the test failed in the dark: what cleans up needs light
            machine.off()
            machine.on()


@pytest.mark.parametrize(("apart", "fs"), [(True, "ext4"), (False, "xfs")], ids=["four disks", "one disk"])
def test_two_cuts_under_load(make_truth: MakeTruth, apart: bool, fs: str) -> None:
    machine, found = make_truth(apart=apart, fs=fs)
    with under_load(machine, found, seed=1) as truth:
        assert len(rounds(truth, 2)) == 2


SOAK = [(True, "ext4"), (False, "xfs"), (True, "xfs"), (False, "ext4"), (True, "ext4")]
"""Twenty cuts each."""


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(len(SOAK)))
def test_a_hundred_cuts_under_load(make_truth: MakeTruth, number: int) -> None:
    apart, fs = SOAK[number]
    machine, found = make_truth(apart=apart, fs=fs)
    with under_load(machine, found, seed=100 + number) as truth:
        rows = rounds(truth, 20, every=5)
    keep_result(f"power-cut-{number + 1}-{'four-disks' if apart else 'one-disk'}-{fs}", rows)
    assert len(rows) == 20


# --- in a rewind in place


def cut_in_a_rewind(
    machine: Machine,
    found: ProtectedSet,
    witness: Witness,
    chooser: random.Random,
    step: str,
    target: Target,
    goal: int,
) -> dict[str, Any]:
    """A rewind to where there are `goal` rows, and the power goes at that step; then `up`, until it is there."""
    here = rows(found)
    command = start_rewind(found, target)
    wait_until(lambda: step_of(found) == step or command.poll() is not None, timeout=120, what=f"step {step}")
    pass_time(chooser.random() * chooser.choice([0.01, 0.1, 0.4]))
    told = machine.cut(chooser.getrandbits(32))
    machine.off()
    reap()
    command.wait(timeout=60)
    machine.on()
    with place_below(scratch_of(found.config.set_id_bytes)):
        pass  # mounts of the command, which no machine has behind a power cut
    left = step_of(found)
    with judged("up"):
        found.up()
        found.wait_following()
        assert step_of(found) is None
    with judged("rows"):
        assert rows(found) in ((goal,) if left in ("write", "start", "run") else (here, goal))
        if rows(found) != goal:
            api.rewind(found.name, target, agree=lambda resolved: None)
        assert rows(found) == goal
        found.amcheck()
    with judged("volume", *BROKEN):
        api.down(found.name)
        witness.assert_volumes()
        found.up()
        found.wait_following()
    with judged("check"):
        wrong = [each for each in api.check(found.name, full=True)["checks"] if not each["ok"]]
        assert not wrong, wrong
    return {"step": step, "left": left, "disks": told}


def cuts_in_rewinds(machine: Machine, found: ProtectedSet, count: int) -> dict[str, Any]:
    """So many, at each step in turn. What was seen, with the seed."""
    seed = random.randrange(1 << 30)
    chooser = random.Random(seed)
    found.sql("drop table pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history")
    targets = make_targets(found)
    witness = Witness(found)
    turns = zip(range(count), itertools.cycle(("write", "start", "stop", "run")), itertools.cycle(targets.items()))
    return {
        "seed": seed,
        "cuts": [
            cut_in_a_rewind(machine, found, witness, chooser, step, there, goal) for _, step, (goal, there) in turns
        ],
    }


IN_REWINDS = [*ALLOWED, r"the agent", START]


def test_the_power_goes_in_a_rewind(make_truth: MakeTruth) -> None:
    machine, found = make_truth(apart=True, allowed=IN_REWINDS)
    assert len(cuts_in_rewinds(machine, found, 2)["cuts"]) == 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("apart", "fs"), [(True, "ext4"), (False, "xfs")], ids=["four disks", "one disk"])
def test_twenty_cuts_in_rewinds(make_truth: MakeTruth, apart: bool, fs: str) -> None:
    machine, found = make_truth(apart=apart, fs=fs, allowed=IN_REWINDS)
    told = cuts_in_rewinds(machine, found, 20)
    keep_result(f"power-cut-in-rewinds-{fs}", told)
    assert {each["left"] for each in told["cuts"]} >= {"write", "start"}


# --- one sync taken out at a time


def without_sync(monkeypatch: pytest.MonkeyPatch, built_for_tests: Path, missing: str) -> None:
    """The sets to come lack a sync: of the engine, by its name, or MODULE:FUNCTION of the agent."""
    if ":" in missing:
        monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "power" / "without_sync"))
        monkeypatch.setenv("PGCDP_TEST_WITHOUT_SYNC", missing)
    else:
        monkeypatch.setenv("PGCDP_ENGINE", str(built_for_tests / f"pgcdp-engine-without-{missing}-sync"))


MISSING = {
    "committer": ("committer", r"^(down|up|volume|commits): "),
    "applier": ("applier", r"^(volume: .*is not what was captured|(down|up): .*is not what it was)"),
    "bundle": ("pgcdp.store.frames:fsync", r"^(down|volume|up|agent): .*/intervals/"),
    "image": ("pgcdp.store.image_files:fsync", r"^(agent|image): .*(/image/|is not boundary)"),
}
"""What is taken out, and where it is noticed."""


@pytest.mark.parametrize("sync", MISSING)
def test_a_missing_sync_is_noticed(
    monkeypatch: pytest.MonkeyPatch, built_for_tests: Path, make_truth: MakeTruth, sync: str
) -> None:
    missing, noticed = MISSING[sync]
    without_sync(monkeypatch, built_for_tests, missing)
    machine, found = make_truth(apart=True, allowed=[""])
    with pytest.raises(Lost, match=noticed) as lost, under_load(machine, found, seed=2) as truth:
        rounds(truth, 5)
    keep_result(f"power-cut-without-{sync}-sync", {"noticed": str(lost.value), "in cut": truth.cuts})
