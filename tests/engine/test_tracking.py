"""on_full = track: the journal cannot grow, production runs on, and the way back loses nothing."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pgcdp.capture.journal import Journal
from pgcdp.capture.tracked import unrecorded_gap
from tests.faults.service import Faults
from tests.fix_engine import BLOCK, MIB, Capture, Direct, MakeCapture
from tests.model import MARK, Write, Wrong, read_journal, read_tracked, replay
from tests.raw_workload import Workload, erase
from tests.waiting import wait_until

GAP_BEGIN, GAP_END = 3, 4
IDLE, TRACKING, HEALING = 0, 1, 2
SAID = ["the journal is full", "writes go on", "the journal cannot grow", "blocks were changed while the journal"]
SMALL: dict[str, Any] = {"journal_limit": 32 * MIB, "on_full": "track", "allowed": SAID}


class Keeper:
    """What the agent is in service: takes writes out of the journal, and gives its segments free."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.writes: dict[int, Write] = {}

    def take(self) -> None:
        """Everything durable so far; then its room is given free."""
        durable = int(self.capture.status()["durable_write"])
        journal = read_journal(self.capture.journal)
        for write in journal.writes:
            if write.number <= durable:
                assert self.writes.setdefault(write.number, write) == write, f"write {write.number} has changed"
        assert not self.writes or sorted(self.writes) == list(range(1, durable + 1))
        self.capture.request("release", write=durable)

    def take_some(self) -> None:
        """As `take` beside a writer: a segment may be used again meanwhile, or a batch come behind the reading.

        What is damaged stays so, and is told after some tries.
        """
        for _ in range(20):
            with suppress(FileNotFoundError, Wrong):
                return self.take()
        self.take()

    def take_stopped(self) -> None:
        """What the journal of a stopped process holds."""
        for write in read_journal(self.capture.journal).writes:
            self.writes.setdefault(write.number, write)

    def volumes(self, upto: int) -> list[bytes]:
        """The volumes' bytes after write `upto`."""
        baseline = [self.capture.baseline(name).read_bytes() for name in self.capture.volumes]
        ordered = [self.writes[number] for number in sorted(self.writes)]
        return [bytes(each) for each in replay(baseline, ordered, upto)]

    def gaps(self) -> list[Write]:
        return [w for _, w in sorted(self.writes.items()) if w.kind == MARK and w.flags in (GAP_BEGIN, GAP_END)]


def state(capture: Capture) -> str:
    return str(capture.status()["state"])


def assert_writes_wait(capture: Capture, keeper: Keeper, seed: int) -> None:
    """Under load until the journal is full: no gap begins, and what waited goes on when there is room."""

    def has_room() -> bool:  # until it is full again
        keeper.take_some()
        return state(capture) == "capturing"

    with load(capture, seed):
        wait_until(lambda: state(capture) == "stalled", timeout=120, what="a full journal")
        ended = threading.Event()
        assert not ended.wait(6), "twice what is waited for before changes are tracked"
        assert state(capture) == "stalled"
        wait_until(has_room, what="room")
        keeper.take_some()


def backings(capture: Capture) -> list[bytes]:
    return [capture.backing(name).read_bytes() for name in capture.volumes]


def differing(one: bytes, other: bytes) -> set[int]:
    return {i // BLOCK for i in range(0, len(one), BLOCK) if one[i : i + BLOCK] != other[i : i + BLOCK]}


@contextmanager
def load(capture: Capture, seed: int, pause: float = 0.0) -> Iterator[Workload]:
    """Writers on all volumes, that end with the block, or with the engine."""
    work = Workload(
        [capture.device(n) for n in capture.volumes], seed=seed, first_writer=10 * seed, max_blocks=32, pause=pause
    )
    work.start()
    try:
        yield work
    finally:
        work.finish()


def fill(capture: Capture, work: Workload) -> None:
    """Until changes are tracked, and then some more."""
    wait_until(lambda: state(capture) == "tracking", timeout=120, what="tracking")
    work.wait_answered(work.answered + 300)


def healing(capture: Capture, keeper: Keeper) -> bool:
    """Makes room, and asks for it."""
    keeper.take_some()
    status = capture.status()
    if status["state"] == "tracking" and not status["tracked"]["healing"]:
        capture.request("heal")
    return status["state"] != "tracking" or bool(status["tracked"]["healing"])


def heal(capture: Capture, keeper: Keeper) -> None:
    """As the agent does it, until there is no gap any more."""

    def healed() -> bool:
        keeper.take_some()
        status = capture.status()
        if status["state"] == "tracking" and not status["tracked"]["healing"]:
            capture.request("heal")
        return bool(status["state"] == "capturing")

    wait_until(healed, timeout=120, what="healing")


def assert_one_gap(keeper: Keeper) -> tuple[int, int]:
    """(begin, end) of the only gap."""
    found = keeper.gaps()
    assert [w.flags for w in found][-1] == GAP_END
    assert {w.flags for w in found[:-1]} == {GAP_BEGIN}
    assert len({w.data for w in found}) == 1
    assert found[0].data.startswith(b"untracked ")
    return found[0].number, found[-1].number


def assert_volumes_equal_writes(capture: Capture, keeper: Keeper) -> None:
    """After a clean stop: baseline and all that was ever in the journal is what the volumes hold."""
    last = read_journal(capture.journal)
    keeper.take_stopped()
    assert sorted(keeper.writes) == list(range(1, last.last_write + 1))
    for name, expected, found in zip(capture.volumes, keeper.volumes(last.last_write), backings(capture), strict=True):
        assert differing(expected, found) == set(), f"volume {name}"


@pytest.mark.parametrize("seed", range(6))
def test_kills_while_changes_are_tracked_and_while_they_are_healed(make_capture: MakeCapture, seed: int) -> None:
    """Each block that the journal lacks is marked before it is on a volume; behind the gap nothing is lacking."""
    rng = random.Random(seed)
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB}, **SMALL)
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
        keeper.take()
        for kill in range(2):
            work.wait_answered(work.answered + rng.randint(1, 200))
            capture.kill()
            work.finish()
            behind, noted = read_journal(capture.journal).last_write, read_tracked(capture.journal / "tracked")
            assert (noted.state, noted.behind) == (TRACKING, max(keeper.writes))
            assert behind == noted.behind
            for marked, then, now in zip(noted.blocks, keeper.volumes(behind), backings(capture), strict=True):
                assert differing(then, now) <= marked
            capture.start()
            assert state(capture) == "tracking"
            work = Workload([capture.device(n) for n in capture.volumes], seed=kill + 7, first_writer=100 + 10 * kill)
            work.start()
        work.finish()
    with load(capture, 3, pause=0.002):
        keeper.take_some()
        wait_until(lambda: "error" not in capture.request("heal"), what="room")
        if seed % 2:  # killed on the way back
            capture.kill()
    if seed % 2:
        capture.start()
    with load(capture, 4, pause=0.002):
        heal(capture, keeper)
    keeper.take_some()
    begin, end = assert_one_gap(keeper) if seed % 2 == 0 else (keeper.gaps()[0].number, keeper.gaps()[-1].number)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)
    assert begin == noted.behind + 1 < end
    assert read_tracked(capture.journal / "tracked").state == IDLE
    assert not any(read_tracked(capture.journal / "tracked").blocks)


def test_the_journal_is_full_again_while_it_heals(make_capture: MakeCapture) -> None:
    """It falls back to tracking, in the same gap, and what was brought in meanwhile stays right."""
    capture = make_capture({"data": 128 * MIB}, **SMALL)
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
    with Direct(capture.device("data")) as volume:
        for at in range(0, 128 * MIB, MIB):
            volume.write(at, at.to_bytes(8, "little") * (MIB // 8))
    keeper.take()
    with load(capture, 2) as work:  # nobody takes anything out of the journal, which has no room for all of that
        wait_until(lambda: "error" not in capture.request("heal"), what="room")
        assert capture.status()["tracked"]["healing"]
        wait_until(
            lambda: state(capture) == "tracking" and not capture.status()["tracked"]["healing"],
            timeout=120,
            what="tracking again",
        )
        work.wait_answered(work.answered + 300)
    heal(capture, keeper)
    keeper.take_some()
    assert_one_gap(keeper)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_zeros_and_discards_in_the_gap(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 16 * MIB}, **SMALL)
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
    with Direct(capture.device("data")) as volume:
        erase(volume.fd, 2, 0, 4 * MIB, device=False)
        erase(volume.fd, 3, 6 * MIB, 4 * MIB, device=False)
        volume.write(5 * MIB, b"\1" * BLOCK)
        assert volume.read(0, MIB) == bytes(MIB)
    assert capture.status()["tracked"]["blocks"] >= 2049
    keeper.take()
    heal(capture, keeper)
    keeper.take_some()
    begin, end = assert_one_gap(keeper)
    assert keeper.volumes(end) == backings(capture), "without load, the end record is where all is in"
    assert keeper.volumes(begin - 1) != backings(capture)
    assert sum(len(w.data) for w in keeper.writes.values() if begin < w.number < end) < 9 * MIB, "zeros need no data"
    assert capture.stop() == 0


def test_a_stop_in_the_gap_leaves_plain_volumes(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 8 * MIB}, **SMALL)
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
    keeper.take()
    with Direct(capture.device("data")) as volume:
        content = volume.read(0, MIB)
    assert capture.stop() == 0
    assert backings(capture)[0][:MIB] == content
    mark = read_journal(capture.journal).mark
    assert mark is not None
    assert mark.clean
    capture.on_full = "stall"  # what was begun is ended all the same, and nothing is begun
    capture.start()
    assert state(capture) == "tracking"
    assert capture.status()["on_full"] == "stall"
    heal(capture, keeper)
    assert_writes_wait(capture, keeper, 2)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_what_needs_the_journal_is_refused_in_the_gap(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 8 * MIB}, **SMALL)
    capture.start()
    assert capture.request("heal")["error"]["kind"] == "precondition"
    with load(capture, 1) as work:
        fill(capture, work)
    for request in (
        {"cmd": "mark", "name": "here"},
        {"cmd": "mark", "name": "1", "rewind": "begin"},
        {"cmd": "cut"},
        {"cmd": "grow", "volume": "data", "bytes": 8 * MIB},
        {"cmd": "heal"},  # nothing was given free
    ):
        reply = capture.request(**request)
        assert "error" in reply, request
        assert reply["error"]["kind"] in ("tracking", "precondition")
    keeper = Keeper(capture)
    keeper.take()
    assert keeper.gaps() == []
    heal(capture, keeper)
    assert "write" in capture.request("mark", name="here")
    assert capture.stop() == 0


@pytest.fixture
def faulty_capture(faulty_engine: Path, scratch: Path) -> Iterator[Capture]:
    capture = Capture(faulty_engine, scratch / "faulty", {"data": 8 * MIB}, **{**SMALL, "journal_limit": 128 * MIB})
    yield capture
    capture.kill()


def journal_of(capture: Capture) -> Journal:
    return Journal(capture.journal, bytes.fromhex(capture.set_id))


def lose(capture: Capture, how: str) -> None:
    """The bitmap, or a part of it."""
    path = capture.journal / "tracked"
    assert read_tracked(path).state != IDLE
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        os.truncate(path, 2 * BLOCK)
    else:
        with path.open("r+b") as file:
            file.write(bytes(2 * BLOCK))


@pytest.mark.parametrize("lost", ["nothing", "missing", "damaged"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_batch_that_may_be_durable_is_not_replayed_over_what_was_tracked(
    faulty_capture: Capture, faults: Faults, before: int, lost: str
) -> None:
    """Its write is in the segment, its sync failed: behind it lies newer data on the volume that the journal lacks.

    Also without the bitmap: the applied mark says so, too.
    """
    capture = faulty_capture
    capture.allowed = [*SAID, "though changes are tracked"]
    capture.start()
    with Direct(capture.device("data")) as volume:
        for _ in range(before):
            volume.write(0, b"1" * BLOCK)
        faults.set("journal.batch.sync", "eio", times=0)
        volume.write(0, b"2" * BLOCK)  # this batch, in one segment after the other; then it is tracked
        assert state(capture) == "tracking"
        volume.write(0, b"3" * BLOCK)
    capture.kill()
    faults.clear_all()
    assert read_tracked(capture.journal / "tracked").behind == before
    if lost != "nothing":
        lose(capture, lost)
    capture.start()
    assert capture.status()["tracked"]["blocks"] == (1 if lost == "nothing" else 2048)
    with Direct(capture.device("data")) as volume:
        assert volume.read(0, BLOCK) == b"3" * BLOCK
    keeper = Keeper(capture)
    wait_until(lambda: "error" not in capture.request("heal"), what="room")
    wait_until(lambda: state(capture) == "capturing", what="healing")
    keeper.take()
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_writes_wait_while_the_bitmap_cannot_be_written(faulty_capture: Capture, faults: Faults) -> None:
    """A block that is not noted would be lost to the way back."""
    capture = faulty_capture
    capture.start()
    faults.set("journal.batch.sync", "eio", times=0)
    faults.set("tracked.bits.sync", "eio", times=0)
    written = threading.Event()

    def write() -> None:
        with Direct(capture.device("data")) as volume:
            volume.write(0, b"2" * BLOCK)
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: any("bitmap" in each for each in capture.status()["errors"]), timeout=60, what="its failure")
    assert not written.is_set()
    assert state(capture) == "stalled"
    faults.clear_all()
    thread.join(60)
    assert written.is_set()
    wait_until(lambda: not capture.status()["errors"] or state(capture) != "stalled", what="going on")
    assert capture.stop() == 0


@contextmanager
def writing(capture: Capture, content: bytes) -> Iterator[threading.Event]:
    """One write of the first block is under way, answered when the event says so, at the end of the block at last."""
    answered = threading.Event()

    def write() -> None:
        with Direct(capture.device("data")) as volume:
            volume.write(0, content)
        answered.set()

    thread = threading.Thread(target=write)
    thread.start()
    yield answered
    thread.join(60)
    assert answered.is_set()


def test_a_state_that_could_not_be_written_cuts_off_nothing_that_was_answered_later(
    faulty_capture: Capture, faults: Faults
) -> None:
    """A slot says tracking behind W, and its sync failed; then all disks are well again, and W + 1 is answered."""
    capture = faulty_capture
    capture.start()
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"1" * BLOCK)
    faults.set("journal.batch.sync", "eio", times=0)
    faults.set("tracked.state.sync", "eio", times=0)
    with writing(capture, b"2" * BLOCK) as answered:
        wait_until(lambda: bool(faults.fired("tracked.state.sync")), timeout=60, what="the state's failure")
        assert not answered.is_set()
        faults.clear("journal.batch.sync")
        faults.clear("tracked.state.sync")
    capture.kill()
    capture.start()
    with Direct(capture.device("data")) as volume:
        assert volume.read(0, BLOCK) == b"2" * BLOCK
    keeper = Keeper(capture)
    wait_until(lambda: state(capture) == "capturing" or "error" not in capture.request("heal"), what="room")
    wait_until(lambda: state(capture) == "capturing", what="healing")
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_a_gap_has_not_ended_before_the_bitmap_says_so(faulty_capture: Capture, faults: Faults) -> None:
    """Else it would be behind the journal for ever, and the next start would begin a gap that is none."""
    capture = faulty_capture
    capture.start()
    keeper = Keeper(capture)
    faults.set("journal.batch.sync", "eio", times=0)
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"1" * BLOCK)
        assert state(capture) == "tracking"
        faults.set("tracked.bits.sync", "eio", times=0)
        faults.clear("journal.batch.sync")
        wait_until(lambda: "error" not in capture.request("heal"), what="room")
        wait_until(lambda: any("bitmap" in each for each in capture.status()["errors"]), what="its failure")
        for block in range(1, 4):
            volume.write(block * BLOCK, b"2" * BLOCK)
        assert capture.status()["tracked"]["healing"]
        faults.clear("tracked.bits.sync")
        volume.write(0, b"3" * BLOCK)
    wait_until(lambda: state(capture) == "capturing", what="the end")
    assert read_tracked(capture.journal / "tracked").state == IDLE
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)
    assert_one_gap(keeper)


def test_no_room_for_the_bitmap_is_no_reason_not_to_start(faulty_capture: Capture, faults: Faults) -> None:
    """A successor serves production, which waits for it; nothing was tracked."""
    capture = faulty_capture
    faults.set("tracked.new.reserve", "enospc", times=0)
    capture.start()
    assert capture.status()["on_full"] == "stall"
    assert "cannot make the bitmap" in capture.log.read_text()
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"1" * BLOCK)
    assert capture.stop() == 0
    faults.clear_all()
    capture.start()
    assert capture.status()["on_full"] == "track"
    assert capture.stop() == 0


def test_what_is_tracked_in_a_bitmap_that_has_grown_outlives_a_kill(faulty_capture: Capture, faults: Faults) -> None:
    """The new one has the name already when the directory's sync fails: the old one is gone with the process."""
    capture = faulty_capture
    capture.start()
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"1" * BLOCK)
    for path in (capture.backing("data"), capture.baseline("data")):
        with path.open("r+b") as file:
            file.truncate(16 * MIB)
    capture.volumes["data"] = 16 * MIB
    faults.set("tracked.new.directory", "eio")
    capture.request("grow", volume="data", bytes=16 * MIB)
    assert faults.fired("tracked.new.directory")
    faults.set("journal.batch.sync", "eio", times=0)
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"2" * BLOCK)
        assert state(capture) == "tracking"
    capture.kill()
    faults.clear_all()
    noted = read_tracked(capture.journal / "tracked")
    assert (noted.state, noted.behind, [set(each) for each in noted.blocks]) == (TRACKING, 1, [{0}])


def test_a_damaged_bitmap_says_more_blocks_never_fewer(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 16 * MIB}, **{**SMALL, "allowed": [*SAID, "tracked is damaged"]})
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
    keeper.take()
    capture.kill()
    path = capture.journal / "tracked"
    marked = len(read_tracked(path).blocks[0])
    with path.open("r+b") as file:
        file.seek(2 * BLOCK + 100)
        byte = file.read(1)[0]
        file.seek(2 * BLOCK + 100)
        file.write(bytes([byte ^ 0xFF]))
    capture.start()
    assert marked < 4000 <= capture.status()["tracked"]["blocks"]
    heal(capture, keeper)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


@pytest.mark.parametrize("ended", ["killed", "stopped"])
@pytest.mark.parametrize("how", ["missing", "damaged", "cut off"])
def test_a_bitmap_that_is_lost_says_every_block(make_capture: MakeCapture, how: str, ended: str) -> None:
    """Else what it told of would be on the volumes alone, and each later point would lack it."""
    said = "tracked is damaged" if how == "cut off" else "though changes are tracked"
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB}, **{**SMALL, "allowed": [*SAID, said]})
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
        if ended == "killed":
            capture.kill()
    if ended == "stopped":
        assert capture.stop() == 0
    lose(capture, how)
    gap = unrecorded_gap(journal_of(capture))
    assert gap is not None
    assert gap.reason == "untracked"
    capture.start()
    capture.kill()  # the new one is whole before anything else happens
    if how != "cut off":
        assert [len(each) for each in read_tracked(capture.journal / "tracked").blocks] == [2048, 1024]
    capture.start()
    assert capture.status()["tracked"]["blocks"] == 3072
    assert capture.status()["tracked"]["since_ns"] == gap.since_ns
    heal(capture, keeper)
    keeper.take()
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)
    mark = journal_of(capture).applied_mark()
    assert mark is not None
    assert mark.tracking is None


@pytest.mark.parametrize("mark", ["stays", "moves"])
@pytest.mark.parametrize("how", ["missing", "damaged", "cut off"])
def test_what_the_journal_took_while_the_set_heals_is_replayed_without_the_bitmap(
    faulty_capture: Capture, faults: Faults, how: str, mark: str
) -> None:
    """Those writes were answered, and may be in the journal alone."""
    capture = faulty_capture
    capture.allowed = [*SAID, "tracked is damaged", "though changes are tracked"]
    capture.start()
    with load(capture, 1) as work:
        faults.set("journal.batch.sync", "eio", times=0)
        fill(capture, work)
        if mark == "stays":
            faults.set("volume.sync", "slow", times=0, milliseconds=20_000)
        faults.set("tracked.bits.sync", "eio", times=0)  # so that it does not end
        faults.clear("journal.batch.sync")
        wait_until(lambda: "error" not in capture.request("heal"), what="room")
        if mark == "moves":
            behind = capture.status()["tracked"]["behind"]
            wait_until(lambda: capture.status()["synced_write"] > behind, what="another applied mark")
        work.wait_answered(work.answered + 20)
        assert capture.status()["tracked"]["healing"]
        capture.kill()
    faults.clear_all()
    lose(capture, how)
    capture.start()
    assert "as changed" in capture.log.read_text()
    keeper = Keeper(capture)
    heal(capture, keeper)
    keeper.take_some()
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_a_volume_that_is_put_back_in_the_gap(make_capture: MakeCapture) -> None:
    """What the bitmap says of the others stays; until now no capture process started any more."""
    allowed = [*SAID, "of 2 volumes, not of these 1"]
    capture = make_capture({"data": 8 * MIB, "space": 64 * MIB}, **{**SMALL, "allowed": allowed})
    capture.start()
    with load(capture, 1) as work:
        fill(capture, work)
        capture.kill()
    marked = read_tracked(capture.journal / "tracked").blocks
    assert all(marked)
    capture.volumes = {"data": 8 * MIB}
    with pytest.raises(RuntimeError, match="of 2 volumes, not of these 1"):
        capture.start()
    capture.unmount()
    for more in (["--put-back"], []):
        capture.more = more
        capture.start()
        found = read_tracked(capture.journal / "tracked")
        assert (found.state, found.blocks[0]) == (TRACKING, marked[0])
        assert len(found.blocks) == 1
        capture.kill()
    capture.start()
    keeper = Keeper(capture)
    heal(capture, keeper)
    assert capture.stop() == 0
    keeper.take_stopped()
    writes = [write for _, write in sorted(keeper.writes.items()) if write.volume != 1]
    (expected,) = replay([capture.baseline("data").read_bytes()], writes, max(keeper.writes))
    assert differing(bytes(expected), backings(capture)[0]) == set()


def test_a_volume_that_was_to_grow_in_the_gap(make_capture: MakeCapture) -> None:
    """The settings have the new size, the bitmap the old one: what it says stays, and what is new can be tracked."""
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB}, **SMALL)
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
        keeper.take_some()
        capture.kill()
    marked = read_tracked(capture.journal / "tracked").blocks
    for path in (capture.backing("data"), capture.baseline("data")):
        with path.open("r+b") as file:
            file.truncate(256 * MIB)
    capture.volumes["data"] = 256 * MIB
    for _ in range(2):
        capture.start()
        assert read_tracked(capture.journal / "tracked").blocks == marked
        capture.kill()
    capture.start()
    with Direct(capture.device("data")) as volume:
        volume.write(255 * MIB, b"x" * BLOCK)
    assert state(capture) == "tracking"
    assert read_tracked(capture.journal / "tracked").blocks[0] == marked[0] | {255 * 256}
    heal(capture, keeper)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_an_idle_bitmap_that_is_lost_is_made_anew(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 8 * MIB}, **{**SMALL, "allowed": [*SAID, "nothing was tracked"]})
    capture.start()
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"1" * BLOCK)
    capture.kill()
    (capture.journal / "tracked").write_bytes(bytes(4 * BLOCK))
    capture.start()
    assert state(capture) == "capturing"
    assert read_tracked(capture.journal / "tracked").state == IDLE
    assert capture.stop() == 0


def test_the_bitmap_grows_with_the_volume(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 8 * MIB}, **SMALL)
    capture.start()
    for path in (capture.backing("data"), capture.baseline("data")):
        with path.open("r+b") as file:
            file.truncate(256 * MIB)
    capture.volumes["data"] = 256 * MIB
    assert capture.request("grow", volume="data", bytes=256 * MIB) == {"bytes": 256 * MIB}
    assert [a < b for a, b in pairwise([8 * MIB, capture.device("data").stat().st_size])] == [True]
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
    with Direct(capture.device("data")) as volume:
        volume.write(255 * MIB, b"x" * BLOCK)
    keeper.take()
    heal(capture, keeper)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)
