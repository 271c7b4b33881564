"""Power cuts while changes are tracked: a block that was changed is marked, a write that was answered is there.

And on an engine that writes a bit behind its block: a test that would not notice is no test.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.engine.test_tracking import SMALL, TRACKING, Keeper, differing, heal, state
from tests.fix_engine import BLOCK, MIB, Capture, Direct
from tests.fix_power import Disk, Machine, MakeMachine
from tests.model import read_journal, read_tracked, replay
from tests.raw_workload import GONE
from tests.results import keep_result
from tests.waiting import wait_until

SIZE = 32 * MIB
WRITERS = 4
FIRST = 8 * MIB // BLOCK
"""What lies before it fills the journal; behind it each block is written once."""


class Lost(AssertionError):
    """The way back would not bring this block into the journal."""


class OnDisks(Capture):
    """A capture process whose journal and backing lose their power."""

    machine: Machine | None = None

    def backing(self, name: str) -> Path:
        return super().backing(name) if self.machine is None else self.machine.device(name)


def content(block: int) -> bytes:
    return block.to_bytes(8, "little") * (BLOCK // 8)


class Fresh:
    """Writers that write each block once, in stripes of their own; `answered` are those that were."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.answered: list[int] = []
        self.threads = [threading.Thread(target=self._write, args=(i,)) for i in range(WRITERS)]
        self.wrong: list[OSError] = []
        for thread in self.threads:
            thread.start()

    def _write(self, index: int) -> None:
        stripe = (SIZE // BLOCK - FIRST) // WRITERS
        try:
            with Direct(self.capture.device("data")) as volume:
                for block in range(FIRST + index * stripe, FIRST + (index + 1) * stripe):
                    volume.write(block * BLOCK, content(block))
                    self.answered.append(block)
        except OSError as error:
            if error.errno not in GONE:
                self.wrong.append(error)

    def end(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not self.wrong


def cut_while_tracking(make_machine: MakeMachine, scratch: Path, program: Path, seed: int) -> tuple[Capture, Keeper]:
    """Power cut in place of a sync of the volume; judged when it is back. The set is up again then."""
    machine = make_machine(Disk("journal", 96 * MIB), Disk("data", SIZE, fs=None))
    capture = OnDisks(program, scratch / f"set{seed}", {"data": SIZE}, **SMALL)
    capture.machine = machine
    capture.journal = machine.place("journal") / "j"
    try:
        capture.start()
        filling = threading.Thread(target=fill, args=(capture,))
        filling.start()
        wait_until(lambda: state(capture) == "tracking", timeout=120, what="tracking")
        filling.join(60)
        keeper = Keeper(capture)
        machine.arm(seed, "data", 20 + 7 * seed)
        fresh = Fresh(capture)
        fell = machine.fallen()
        capture.kill()
        fresh.end()
        machine.off()
        machine.on()
        judge(capture, fresh)
        keep_result(f"power-cut-tracking-{program.name}-{seed}", {"cut": fell, "answered": len(fresh.answered)})
        capture.start()
        return capture, keeper
    except BaseException:
        capture.kill()
        raise


def cut_often(make_machine: MakeMachine, scratch: Path, program: Path, times: int) -> None:
    for seed in range(times):
        capture, _ = cut_while_tracking(make_machine, scratch, program, seed)
        capture.kill()


def fill(capture: Capture) -> None:
    """Writes until the journal is full, and the last of them was tracked."""
    with Direct(capture.device("data")) as volume:
        while state(capture) != "tracking":
            for at in range(0, FIRST * BLOCK, MIB):
                volume.write(at, b"f" * MIB)


def judge(capture: Capture, fresh: Fresh) -> None:
    journal, noted = read_journal(capture.journal), read_tracked(capture.journal / "tracked")
    assert (noted.state, noted.behind) == (TRACKING, journal.last_write)
    (then,) = replay([bytes(SIZE)], journal.writes, noted.behind)
    now = capture.backing("data").read_bytes()
    unmarked = differing(bytes(then), now) - noted.blocks[0]
    if unmarked:
        raise Lost(f"{len(unmarked)} blocks were changed and are not marked, such as {min(unmarked)}")
    for block in fresh.answered:
        assert now[block * BLOCK : (block + 1) * BLOCK] == content(block), (
            f"block {block} was answered and is not there"
        )


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_while_changes_are_tracked(
    make_machine: MakeMachine, built_for_tests: Path, scratch: Path, seed: int
) -> None:
    capture, keeper = cut_while_tracking(make_machine, scratch, built_for_tests / "pgcdp-engine", seed)
    try:
        heal(capture, keeper)
        assert capture.stop() == 0
        keeper.take_stopped()
        (healed,) = keeper.volumes(max(keeper.writes))
        assert differing(healed, capture.backing("data").read_bytes()) == set()
    finally:
        capture.kill()


def test_a_bit_that_comes_behind_its_block_is_noticed(
    make_machine: MakeMachine, built_for_tests: Path, scratch: Path
) -> None:
    program = built_for_tests / "pgcdp-engine-without-tracker-sync"
    with pytest.raises(Lost) as lost:
        cut_often(make_machine, scratch, program, 12)  # a cut that keeps nothing of what was unsynced, tells nothing
    keep_result("power-cut-without-tracker-order", {"noticed": str(lost.value)})
