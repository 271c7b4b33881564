"""kill -9 of the capture process at random moments, raw volumes: nothing answered is lost, nothing else appears.

Through loop devices with 4096-byte sectors, as a protected cluster has them, and on the FUSE files themselves.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fix_engine import BLOCK, MIB, Capture, Direct, MakeCapture
from tests.model import DISCARD, WRITE, ZERO, Journal, read_journal, replay
from tests.raw_workload import Op, Workload, assert_history, erase


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """A loop device over a served file: direct I/O, 4096-byte sectors, write-through."""
    command = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", str(file)]
    device = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    mode = Path(f"/sys/block/{device.name}/queue/write_cache")
    try:
        mode.write_text("write through")
        yield device
    finally:
        mode.write_text("write back")
        subprocess.run(["losetup", "--detach", str(device)], check=True)


def assert_right(capture: Capture, history: list[Op]) -> Journal:
    """The journal holds the history, and the stopped volumes equal baseline plus journal."""
    journal = read_journal(capture.journal)
    assert [w.number for w in journal.writes] == list(range(1, journal.last_write + 1))
    assert_history(history, journal.writes)
    baseline = [capture.baseline(name).read_bytes() for name in capture.volumes]
    for name, expected in zip(capture.volumes, replay(baseline, journal.writes, journal.last_write), strict=True):
        assert capture.backing(name).read_bytes() == expected, f"volume {name}"
    return journal


def kill_rounds(make_capture: MakeCapture, rounds: int, seed: int) -> None:
    """So many kills in one journal's life, each at another moment."""
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB}, journal_limit=4096 * MIB)
    rng = random.Random(seed)
    history: list[Op] = []
    for round_ in range(rounds):
        capture.start()
        status = capture.status()
        assert status["synced_write"] == status["last_write"], "serves before the replay is durable"
        work = Workload(
            [capture.device(name) for name in capture.volumes],
            seed=seed + round_,
            first_writer=10 * round_,
            mark=lambda name: capture.request("mark", name=name),
        )
        work.start()
        work.wait_answered(rng.randint(0, 200))
        capture.kill()
        work.finish()
        history += work.ops
    capture.start()
    assert capture.stop() == 0
    assert_right(capture, history)


@pytest.mark.parametrize("seed", [100, 200])
def test_five_kills(make_capture: MakeCapture, seed: int) -> None:
    kill_rounds(make_capture, 5, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [1000, 2000, 3000, 4000])
def test_twenty_kills(make_capture: MakeCapture, seed: int) -> None:
    kill_rounds(make_capture, 20, seed)


def test_kill_while_replaying(make_capture: MakeCapture) -> None:
    """A start that is killed before it serves is just another crash."""
    capture = make_capture({"data": 32 * MIB})
    capture.start()
    work = Workload([capture.device("data")], seed=5, max_blocks=128)
    work.start()
    work.wait_answered(400)
    capture.kill()
    work.finish()
    for i in range(8):
        with capture.log.open("ab") as log:
            process = subprocess.Popen(capture.command(create=False), stdout=log, stderr=log)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.002 * (i + 1))
        process.kill()
        process.wait()
        capture.unmount()
    capture.start()
    assert capture.stop() == 0
    assert_right(capture, work.ops)


def test_kill_under_loop_devices(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB})
    history: list[Op] = []
    for round_ in range(3):
        capture.start()
        with loop_device(capture.device("data")) as data, loop_device(capture.device("wal")) as wal:
            work = Workload([data, wal], seed=40 + round_, first_writer=10 * round_)
            work.start()
            work.wait_answered(150)
            capture.kill()
            work.finish()
        history += work.ops
    capture.start()
    assert capture.stop() == 0
    assert_right(capture, history)


def test_kinds_reach_the_journal_through_a_loop_device(make_capture: MakeCapture) -> None:
    """A write-through loop device sends writes, zeros and discards, and no flush."""
    capture = make_capture({"data": 8 * MIB})
    capture.start()
    with loop_device(capture.device("data")) as device, Direct(device) as volume:
        volume.write(0, b"a" * 4 * BLOCK)
        erase(volume.fd, ZERO, BLOCK, BLOCK, device=True)
        erase(volume.fd, DISCARD, 2 * BLOCK, BLOCK, device=True)
        os.fsync(volume.fd)
        assert volume.read(0, 4 * BLOCK) == b"a" * BLOCK + bytes(2 * BLOCK) + b"a" * BLOCK
    assert capture.stop() == 0
    writes = read_journal(capture.journal).writes
    assert {w.kind for w in writes} <= {WRITE, ZERO, DISCARD}
    assert len(writes) == 3
    content = capture.backing("data").read_bytes()[: 4 * BLOCK]
    assert content == b"a" * BLOCK + bytes(2 * BLOCK) + b"a" * BLOCK
