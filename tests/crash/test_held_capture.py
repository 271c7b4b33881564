"""kill -9 of the capture process, and upgrades, under pgbench: a holder keeps the connection, no client sees any.

pgbench itself ends when a client fails; its log of transactions says how long the longest one waited.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.capture import holder
from pgcdp.capture.sharing import captures_at
from pgcdp.errors import PreconditionError
from tests.crash.test_kill_rewind import start_command
from tests.faults.service import Faults
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.held_note import other_answer
from tests.results import keep_result
from tests.waiting import pass_time, wait_until

ALLOWED = [*KILLED, r"checkpoints are occurring too frequently", r"the agent did not answer"]
NO_SUCCESSOR = r"no capture process takes over|locked by another capture process"
SUMS = (
    "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), "
    "(select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)"
)


@dataclass
class Bench:
    """pgbench with 8 clients for so many seconds. `ended` and `end` raise unless every transaction came through."""

    found: ProtectedSet
    seconds: int
    place: Path
    process: subprocess.Popen[str]
    history: int
    longest: float = 0.0
    transactions: int = 0

    @classmethod
    def start(cls, found: ProtectedSet, seconds: int) -> Bench:
        place = found.root / "bench"
        place.mkdir(exist_ok=True)
        place.chmod(0o777)
        for old in place.iterdir():
            old.unlink()
        options = ("-n", "-c", "8", "-j", "2", "-T", str(seconds), "-l", f"--log-prefix={place}/log")
        user, before = postgres_user(), cls.rows(found)
        process = subprocess.Popen(
            found.program("pgbench", *options, "postgres"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd="/", user=user.uid, group=user.gid,
        )  # fmt: skip
        return cls(found, seconds, place, process, before)

    @staticmethod
    def rows(found: ProtectedSet) -> int:
        """Rows of the history now: one for each transaction that was ever done."""
        return int(found.sql("select count(*) from pgbench_history")[0][0])

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """End it now, in order: what its own clock tells it when its time is over."""
        self.process.send_signal(signal.SIGALRM)
        self.ended()

    def ended(self) -> None:
        """Wait for its end."""
        out, err = self.process.communicate(timeout=self.seconds + 120)
        assert self.process.returncode == 0, out + err
        assert "number of failed transactions: 0" in out, out
        assert not [line for line in err.splitlines() if "error" in line.lower()], err
        for log in self.place.iterdir():
            waits = [int(line.split()[2]) for line in log.read_text().splitlines()]
            self.transactions += len(waits)
            self.longest = max([self.longest, *(wait / 1e6 for wait in waits)])
        told = int(out.partition("number of transactions actually processed: ")[2].split()[0].split("/")[0])
        assert told == self.transactions
        assert self.transactions > 0


@dataclass
class Seen:
    """What a run of kills saw."""

    kills: int = 0
    upgrades: int = 0
    transactions: int = 0
    stalls: list[float] = field(default_factory=list)


def make(make_set: MakeSet, binaries_of: BindirOf, **options: Any) -> ProtectedSet:
    if holder.missing() is not None:
        pytest.skip(f"no holder here: {holder.missing()}")
    settings = {"max_wal_size": "128MB", "shared_buffers": "32MB", "checkpoint_timeout": "30s"}
    allowed = [*ALLOWED, *options.pop("allowed", ())]
    found = make_set(binaries_of(15), size=512 << 20, settings=settings, allowed=allowed, **options)
    found.pgbench("-i", "-q", "-s", "5")
    return found


@contextmanager
def bench(found: ProtectedSet, seconds: int) -> Iterator[Bench]:
    """Inside, pgbench runs; behind it, it has ended without an error, and all that it did is there."""
    load = Bench.start(found, seconds)
    try:
        yield load
        load.ended()
    finally:
        if load.runs:
            load.process.kill()
            load.process.communicate()
    assert Bench.rows(found) == load.history + load.transactions
    assert len(set(found.sql(SUMS)[0])) == 1, "pgbench's sums differ"


def serves(found: ProtectedSet, captures: int) -> bool:
    """Whether the capture process with that number of its holder serves."""
    with suppress(PreconditionError):
        return bool(found.engine.status().raw["held"]["captures"] == captures)
    return False


def captures(found: ProtectedSet) -> int:
    return int(found.engine.status().raw["held"]["captures"])


def rounds(found: ProtectedSet, kills: int, upgrades: int, seed: int, seconds: int) -> Seen:
    """So many kills and upgrades at random moments of runs of pgbench."""
    chooser = random.Random(seed)
    deeds = ["kill"] * kills + ["upgrade"] * upgrades
    chooser.shuffle(deeds)
    seen = Seen()
    while deeds:
        with bench(found, seconds) as load:
            for _ in range(max(1, min(len(deeds), seconds // 4))):
                pass_time(chooser.random() * 3)
                if not load.runs:  # a slow machine: what is left comes in the next run
                    break
                deed, number = deeds.pop(), captures(found)
                if deed == "kill":
                    found.kill_capture()
                    seen.kills += 1
                else:
                    api.up(found.name, upgrade=True)
                    seen.upgrades += 1
                wait_until(lambda n=number: serves(found, n + 1), timeout=60, what="the next capture process")  # type: ignore[misc]
        seen.transactions += load.transactions
        seen.stalls.append(load.longest)
    return seen


def prove(found: ProtectedSet, seen: Seen, boundary: int) -> None:
    """Everything else that must be true behind such a run."""
    status = found.status()
    assert status["state"] == "capturing"
    assert status["held"]["restarts"] == seen.kills + seen.upgrades
    assert status["held"]["problem"] is None
    # The agent writes down behind the start of the next process, by a thread of its own, that there was one.
    wanted = min(10, seen.kills + seen.upgrades)
    wait_until(lambda: len(api.info(found.name)["restarts"]) >= wanted, what=f"{wanted} restarts in the history")
    told = api.info(found.name)["restarts"]
    assert len(told) == wanted
    assert {each["why"] for each in told} <= {"died", "upgrade"}
    found.wait_following()
    found.amcheck()
    assert api.cut(found.name)["number"] > boundary
    postmaster = found.sql("select pg_postmaster_start_time()")
    assert postmaster
    api.down(found.name)
    assert holder.find(found.config.paths) is None, "the holder outlives the set"
    found.assert_volume_is_newest()
    assert_clean(found)
    found.up()
    assert len(set(found.sql(SUMS)[0])) == 1


def assert_clean(found: ProtectedSet) -> None:
    """The filesystem of each volume has nothing to complain of. Call it `down`."""
    for volume in found.config.volumes:
        program = ["e2fsck", "-fn"] if volume.fs == "ext4" else ["xfs_repair", "-n", "-f"]
        done = subprocess.run([*program, str(volume.backing)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_three_kills_and_an_upgrade(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    found = make(make_set, binaries_of, fs=fs)
    boundary = api.cut(found.name)["number"]
    began = found.sql("select pg_postmaster_start_time()")
    seen = rounds(found, kills=3, upgrades=1, seed=8, seconds=16)
    assert found.sql("select pg_postmaster_start_time()") == began, "Postgres was started anew"
    print(f"the longest transaction of {seen.transactions} took {max(seen.stalls):.3f} s")
    assert max(seen.stalls) < 30
    prove(found, seen, boundary)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_hundred_kills_and_ten_upgrades(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    found = make(make_set, binaries_of, fs=fs)
    boundary = api.cut(found.name)["number"]
    seen = rounds(found, kills=100, upgrades=10, seed=80, seconds=32)
    keep_result(
        f"held-{fs}",
        {
            "clients": 8,
            "kills": seen.kills,
            "upgrades": seen.upgrades,
            "transactions": seen.transactions,
            "failed": 0,
            "longest_seconds": round(max(seen.stalls), 3),
            "longest_of_each_run": [round(stall, 3) for stall in seen.stalls],
        },
    )
    prove(found, seen, boundary)


def test_found_again_when_all_else_is_dead(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Agent and capture killed: writes wait, the state says so, nothing that asks for it hangs, and `up` goes on."""
    found = make(make_set, binaries_of)
    kept = found.status()["held"]["holder"]
    assert kept is not None
    with bench(found, 12) as load:
        pass_time(1)
        found.kill_agent()
        found.kill_capture()
        status = found.status()
        assert (status["state"], status["postgres"]) == ("stalled", "running")
        assert "no capture process serves the volumes" in status["held"]["problem"]
        check = {each["name"]: each for each in api.check(found.name)["checks"]}
        assert not check["holder"]["ok"]
        assert not check["capture"]["ok"]
        pass_time(1)
        assert load.runs
        found.up()
        status = found.status()
        assert (status["state"], status["held"]["holder"]) == ("capturing", kept)
    found.wait_following()


def test_down_when_all_else_is_dead_is_a_clean_end(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make(make_set, binaries_of)
    found.kill_agent()
    found.kill_capture()
    api.down(found.name)
    assert found.status()["state"] == "stopped"
    found.assert_volume_is_newest()
    assert_clean(found)
    log = found.config.cluster.log_file.read_text()
    assert log.rstrip().endswith("database system is shut down"), "Postgres was not stopped in peace"
    found.up()


def test_a_dead_holder_is_followed_by_another(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """By the agent's doing, and without an agent by `up`; the new one keeps the connection as the old one did."""
    found = make(make_set, binaries_of, allowed=[r"the holder of main was gone"])
    first = found.status()["held"]["holder"]
    with bench(found, 14):
        pass_time(0.5)
        found.kill_holder()
        second = wait_until(lambda: found.status()["held"]["holder"], what="another holder")
        assert second != first
        found.kill_capture()
        wait_until(lambda: serves(found, 2), timeout=60, what="the next capture process")
        found.kill_agent()
        found.kill_holder()
        status = found.status()
        assert status["held"]["holder"] is None
        assert "the holder is gone" in status["held"]["problem"]
        check = {each["name"]: each for each in api.check(found.name)["checks"]}
        assert (check["holder"]["ok"], check["holder"]["hint"]) == (False, "pgcdp up main")
        found.up()
        assert found.status()["held"]["problem"] is None
        found.kill_capture()
        wait_until(lambda: serves(found, 3), timeout=60, what="the next capture process")
    found.wait_following()
    found.amcheck()


def test_what_keeps_the_next_one_from_its_start_is_said_and_may_be_mended(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """The journal's directory is gone for a while. Nothing is lost by waiting, so writes wait."""
    found = make(make_set, binaries_of, allowed=[NO_SUCCESSOR, r"cannot open the journal", r"journal"])
    journal = found.config.journal
    aside = journal.with_name("aside")
    with bench(found, 14) as load:
        pass_time(0.5)
        os.rename(journal, aside)
        found.kill_capture()
        wait_until(
            lambda: "cannot open the journal" in (found.status()["held"]["problem"] or ""),
            timeout=20,
            what="the reason",
        )
        assert found.status()["state"] == "stalled"
        assert load.runs
        os.rename(aside, journal)
        wait_until(lambda: serves(found, 2), timeout=60, what="the next capture process")
    found.wait_following()
    found.amcheck()
    api.down(found.name)
    found.assert_volume_is_newest()
    found.up()


def test_an_upgrade_that_cannot_be_is_refused_and_changes_nothing(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make(make_set, binaries_of, segment_size=8 << 20)
    api.cut(found.name)
    found.sql("create table more as select repeat('x', 1000) from generate_series(1, 24000)")
    wait_until(lambda: found.status()["agent"]["taken_write"] >= found.durable(), what="the agent has read them")
    engine, agent = found.engine.status().pid, found.agent_pid()
    # The last but the current one and the next: nobody reads it now, and it is not used again before the next boundary.
    segment = sorted(found.config.journal.glob("*.seg"))[-3]
    with segment.open("r+b") as file:
        file.seek(8)
        file.write((2).to_bytes(4, "little"))
    try:
        with pytest.raises(PreconditionError, match=r"has format 2, the installed version reads 1") as refused:
            api.up(found.name, upgrade=True)
        assert refused.value.hint is not None
        assert "install a version that reads format 2" in refused.value.hint
    finally:
        with segment.open("r+b") as file:
            file.seek(8)
            file.write((1).to_bytes(4, "little"))
    assert (found.engine.status().pid, found.agent_pid()) == (engine, agent)
    api.up(found.name, upgrade=True)
    assert found.engine.status().pid != engine
    assert found.agent_pid() != agent
    assert [each["why"] for each in api.info(found.name)["restarts"]] == ["upgrade"]
    assert found.sql("select count(*) from pgbench_branches") == [(5,)]


def test_without_a_holder_it_is_as_before(
    make_set: MakeSet, binaries_of: BindirOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on kernels before 6.9: said by `check`, and an upgrade is refused."""
    monkeypatch.setenv(holder.SWITCH, "off")
    dead = [r"PANIC:  ", r"(FATAL|ERROR|WARNING):  ", r"connection to client lost"]
    found = make_set(binaries_of(15), size=384 << 20, allowed=[*ALLOWED, *dead])
    status = found.status()
    assert status["held"]["holder"] is None
    assert "PGCDP_HOLDER is off" in status["held"]["problem"]
    check = {each["name"]: each for each in api.check(found.name)["checks"]}
    assert check["holder"]["ok"]
    assert check["holder"]["warning"]
    assert check["holder"]["detail"].startswith("none: ")
    with pytest.raises(PreconditionError, match="has no holder") as refused:
        api.up(found.name, upgrade=True)
    assert "pgcdp down main and pgcdp up main" in str(refused.value.hint)
    found.sql("create table t as select generate_series(1, 1000)")
    found.kill_capture()
    wait_until(lambda: not found.capturing(), what="the end of capture")
    assert found.status()["state"] == "stopped"
    found.up()
    assert found.sql("select count(*) from t") == [(1000,)]
    monkeypatch.delenv(holder.SWITCH)
    api.down(found.name)
    found.up()
    assert found.status()["held"]["problem"] is None


def test_an_upgrade_to_what_would_agree_on_something_else_is_refused_before_anything_ends(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """Found only by the successor, it would leave writes waiting for ever: the one before has ended by then."""
    found = make(make_set, binaries_of, allowed=[NO_SUCCESSOR, r"would agree on something else"])
    engine, agent = found.engine.status().pid, found.agent_pid()
    with other_answer(holder.socket_of(found.config.paths)):
        with pytest.raises(PreconditionError, match=r"cannot go on from the running one: .* something else") as told:
            api.up(found.name, upgrade=True)
        assert "pgcdp down main and pgcdp up main" in str(told.value.hint)
        assert (found.engine.status().pid, found.agent_pid()) == (engine, agent)
        found.sql("create table meanwhile as select 1 as n")
    api.up(found.name, upgrade=True)
    assert found.engine.status().pid != engine
    assert found.sql("select n from meanwhile") == [(1,)]


def test_a_capture_process_that_replays_is_waited_for_when_its_starter_was_killed(
    make_set: MakeSet, binaries_of: BindirOf, faulty_engine: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the journal's lock and does not answer yet: the next command must neither fail for that nor hide it."""
    found = make(make_set, binaries_of, allowed=[NO_SUCCESSOR])
    monkeypatch.setenv("PGCDP_ENGINE", str(faulty_engine))
    faults.set("volume.replay.sync", "slow", milliseconds=2000)
    with bench(found, 12) as load:
        pass_time(1)
        found.kill_agent()
        found.kill_capture()
        command = start_command(found, "up", found.name)
        control = found.config.paths.control
        (pid,) = wait_until(lambda: captures_at(control), interval=0.002, what="the next capture process")
        command.kill()
        command.wait()
        assert not found.capturing(), "it serves already: this tests nothing"
        found.up()
        assert found.engine.status().pid == pid
        assert load.runs
    found.wait_following()
