"""A holder keeps the connection: capture processes are killed and replaced under writers that never see an error."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fix_engine import BLOCK, MIB, Capture, Direct, _is_mounted, _may_flush
from tests.held_note import other_answer
from tests.model import read_journal, replay
from tests.raw_workload import Workload, assert_history
from tests.waiting import pass_time, wait_until

LOOKS = 300


class Held(Capture):
    """A capture process behind a holder. `end` is the way out, whatever state it is in."""

    holder: subprocess.Popen[bytes] | None = None

    @property
    def door(self) -> Path:
        return self.root / "holder.sock"

    def hold(self, *arguments: str) -> None:
        """Start a holder, and wait until it gives its descriptors."""
        words = arguments or (f"--fuse={self.fuse}",)
        with self.log.open("ab") as log:
            self.holder = subprocess.Popen(
                [str(self.program), "hold", f"--socket={self.door}", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(lambda: self.handed() or self.holder.poll() is not None, what="the holder")  # type: ignore[union-attr]
        assert self.holder.poll() is None, self.log.read_text()

    def handed(self) -> int:
        """How many descriptors the holder gives."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            try:
                door.connect(str(self.door))
                _, files, _, _ = socket.recv_fds(door, 64, 4)
            except OSError:
                return 0
            for file in files:
                os.close(file)
            return len(files)

    def command(self, *, create: bool) -> list[str]:
        words = super().command(create=create)
        return [*words[:2], f"--holder={self.door}", *words[2:]]

    def fits(self) -> tuple[int, str]:
        """Exit code and stderr of who asks whether this engine could take over."""
        words = [str(self.program), "hold", f"--socket={self.door}", "--fits"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    def crash(self) -> None:
        """kill -9 of the capture process alone."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=60)
        self.process = None

    def end(self) -> None:
        for process in (self.holder, self.process):
            if process is not None:
                process.kill()
                process.wait(timeout=60)
        self.unmount()


@pytest.fixture
def held(engine_program: Path, scratch: Path) -> Iterator[Held]:
    """Two volumes, and a holder that has mounted; nothing captures yet."""
    capture = Held(engine_program, scratch / "set", {"data": 8 * MIB, "wal": 4 * MIB}, journal_limit=2048 * MIB)
    capture.hold()
    yield capture
    capture.end()
    assert capture.complaints() == [], "in the engine's log"


def assert_right(capture: Held, work: Workload, resent: bool = True) -> None:
    """The journal holds the history, and the stopped volumes equal baseline plus journal."""
    journal = read_journal(capture.journal)
    assert [w.number for w in journal.writes] == list(range(1, journal.last_write + 1))
    assert_history(work.ops, journal.writes, resent)
    baseline = [capture.baseline(name).read_bytes() for name in capture.volumes]
    for name, expected in zip(capture.volumes, replay(baseline, journal.writes, journal.last_write), strict=True):
        assert capture.backing(name).read_bytes() == expected, f"volume {name}"


def started(capture: Held, seed: int, writers: int = 4) -> Workload:
    capture.start()
    work = Workload([capture.device(name) for name in capture.volumes], seed=seed, writers=writers)
    work.start()
    return work


def kill_rounds(capture: Held, rounds: int, seed: int) -> int:
    """So many kills under writers that go on; how many requests were sent again."""
    rng = random.Random(seed)
    work = started(capture, seed, writers=8)
    resent = 0
    for _ in range(rounds):
        before = work.answered
        work.wait_answered(before + rng.randint(0, 300))
        pass_time(rng.random() / 100)
        capture.crash()
        assert not work.ended(), "a writer saw the end of the capture process"
        capture.start()
        status = capture.status()
        before = work.answered
        work.wait_answered(before + 20)
        resent += capture.status()["held"]["resent"]
        assert status["held"]["captures"] == capture.starts
    work.finish()
    assert all(op.answered for op in work.ops), "an operation ended with an error"
    assert capture.stop() == 0
    assert capture.holder is not None
    assert capture.holder.wait(timeout=60) == 0, "the holder outlives its mount"
    assert not _is_mounted(capture.fuse)
    assert_right(capture, work)
    return resent


@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_and_no_error(held: Held, seed: int) -> None:
    assert kill_rounds(held, 10, seed) > 0, "nothing was under way at any kill: this tests nothing"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [10, 20, 30])
def test_hundred_kills_and_no_error(held: Held, seed: int) -> None:
    assert kill_rounds(held, 100, seed) > 0


def test_killed_on_its_way_up_the_next_one_takes_over(held: Held) -> None:
    """Also before the kernel has its first answer, and while what came again is under way."""
    for i in range(12):
        with held.log.open("ab") as log:
            process = subprocess.Popen(held.command(create=i == 0), stdout=log, stderr=log)
        if i == 0:  # the journal is there then, and the connection not yet begun
            wait_until((held.journal / "applied").exists, interval=0.0005, what="the journal")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.001 * i)
        process.kill()
        process.wait()
    held.starts = 1
    work = started(held, 7)
    work.wait_answered(300)
    for i in range(12):
        held.crash()
        with held.log.open("ab") as log:
            held.process = subprocess.Popen(held.command(create=False), stdout=log, stderr=log)
        with pytest.raises(subprocess.TimeoutExpired):
            held.process.wait(timeout=0.002 * i)
    held.crash()
    held.start()
    work.wait_answered(work.answered + 100)
    work.finish()
    assert all(op.answered for op in work.ops)
    assert held.stop() == 0
    assert_right(held, work)


def test_handed_over_the_journal_is_clean_and_nothing_is_written_twice(held: Held) -> None:
    work = started(held, 3, writers=8)
    for _ in range(5):
        work.wait_answered(work.answered + 200)
        assert held.process is not None
        assert held.request("hand_over") == {"handing_over": True}
        assert held.process.wait(timeout=60) == 0
        held.process = None
        assert held.engine("check").returncode == 0
        mark = read_journal(held.journal).mark
        assert mark is not None
        assert mark.clean, "what it had answered is not applied"
        assert not work.ended()
        held.start()
        work.wait_answered(work.answered + 20)
    work.finish()
    assert all(op.answered for op in work.ops)
    assert held.stop() == 0
    assert_right(held, work, resent=False)


def test_open_files_are_known_to_the_next_one(held: Held) -> None:
    """Stopped under an open volume it would leave a filesystem without its device."""
    held.start()
    with opened(held) as volume:
        volume.write(0, b"a" * BLOCK)
        held.crash()
        held.start()
        assert [each["open"] for each in held.status()["volumes"]] == [True, False]
        assert held.request("stop")["error"]["kind"] == "busy"
        assert volume.read(0, BLOCK) == b"a" * BLOCK
    assert held.stop() == 0


def test_the_holder_ends_by_nothing_but_the_end_of_its_mount(held: Held) -> None:
    assert held.holder is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGUSR1):
        held.holder.send_signal(number)
    held.start()
    held.crash()
    assert held.handed() == 2
    status = Path(f"/proc/{held.holder.pid}/status").read_text()
    locked = re.search(r"VmLck:\s+(\d+)", status)
    assert locked
    sanitized = "asan" in held.program.parent.name  # which makes nothing of mlockall
    assert int(locked[1]) > 0 or sanitized, "its memory can be swapped out"
    score = Path(f"/proc/{held.holder.pid}/oom_score_adj").read_text().strip()
    assert score == "-1000" or not _may_flush(), "it could be chosen when memory is short"
    assert status.count("Threads:\t1\n") == 1
    held.start()
    assert held.stop() == 0
    assert held.holder.wait(timeout=60) == 0


def test_only_root_is_given_the_connection(held: Held) -> None:
    """Who has it can answer for the volumes."""
    assert held.door.stat().st_mode & 0o777 == 0o600
    for place in (held.root.parent, held.root):
        place.chmod(0o755)
    held.door.chmod(0o666)
    os.seteuid(65534)
    try:
        assert held.handed() == 0
    finally:
        os.seteuid(0)
    assert held.handed() == 2


def test_one_holder_a_set(held: Held) -> None:
    words = [str(held.program), "hold", f"--socket={held.door}", f"--fuse={held.fuse}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert "is locked by another holder" in done.stderr
    assert held.handed() == 2


def opened(held: Held) -> Direct:
    """A volume, opened. Not for the first time: from the first close on the kernel knows that closing asks for nothing.

    Else this process, when it starts another one, would wait for that to answer what it closes on its way.
    """
    held.device("data").open("rb").close()
    return Direct(held.device("data"))


def test_who_only_looks_whether_it_lives_keeps_nobody_waiting(held: Held) -> None:
    """Commands that wait for the next capture process look many times a second, and that one asks the same holder."""
    since = time.monotonic()
    for _ in range(LOOKS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.connect(str(held.door))
    assert held.handed() == 2
    assert time.monotonic() - since < LOOKS / 20


@pytest.mark.parametrize("what", ["another answer", "damaged"])
def test_who_would_agree_on_something_else_does_not_take_over(held: Held, what: str) -> None:
    """Another libfuse, for instance, that would mean something else by what the kernel sends."""
    held.start()
    with opened(held) as volume:
        volume.write(0, b"a" * BLOCK)
        held.crash()
        with other_answer(held.door, whole=what == "another answer"):
            for code, text in (held.fits(), held.run_refused()):
                assert code == 6, text
                assert "cannot be taken over" in text
                assert "hint: pgcdp down and pgcdp up begin another one" in text
        assert held.fits() == (0, "")
        held.start()
        assert held.fits() == (0, ""), "asked while another one serves"
        assert volume.read(0, BLOCK) == b"a" * BLOCK
    assert held.stop() == 0


def test_another_holder_takes_the_connection_from_capture(held: Held) -> None:
    """The first one was killed; then the capture process is: still no writer sees an error."""
    work = started(held, 5)
    assert held.holder is not None
    held.holder.kill()
    held.holder.wait()
    status = held.status()
    fds = [f"--fuse-fd={status['held']['fuse_fd']}", f"--note-fd={status['held']['note_fd']}"]
    held.hold(f"--of={status['pid']}", *fds)
    work.wait_answered(work.answered + 100)
    held.crash()
    held.start()
    assert held.status()["held"]["captures"] == 2
    work.wait_answered(work.answered + 100)
    work.finish()
    assert all(op.answered for op in work.ops)
    assert held.stop() == 0
    assert held.holder.wait(timeout=60) == 0
    assert_right(held, work)


def test_without_holder_and_capture_there_are_errors(held: Held) -> None:
    """The old way, so that what the other tests show is the holder's doing."""
    work = started(held, 6)
    work.wait_answered(100)
    assert held.holder is not None
    held.holder.kill()
    held.holder.wait()
    held.crash()
    work.join(30)
    assert not all(op.answered for op in work.ops)
    code, text = held.run_refused()
    assert code == 6
    assert "no holder gives its descriptors" in text
    held.unmount()
    held.hold()
    held.start()
    assert held.stop() == 0
    assert_right(held, work)


def test_hand_over_without_a_holder_is_refused(engine_program: Path, scratch: Path) -> None:
    capture = Capture(engine_program, scratch / "plain", {"data": 4 * MIB})
    capture.start()
    try:
        told = capture.request("hand_over")
        assert told["error"]["kind"] == "precondition", json.dumps(told)
        assert capture.status()["held"] is None
        assert capture.stop() == 0
    finally:
        capture.kill()
