"""Reads beside writes: never older than what was answered before, never torn, however many there are at once."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.fix_engine import BLOCK, MIB, Capture, Direct, MakeCapture

BLOCKS = 16 * MIB // BLOCK
WORDS = BLOCK // 8


class Generations:
    """Blocks that say in each word who they are and how often they were written: one writer, many readers."""

    def __init__(self, capture: Capture) -> None:
        self.path = capture.device("data")
        self.issued = np.zeros(BLOCKS, dtype=np.uint64)
        self.answered = np.zeros(BLOCKS, dtype=np.uint64)
        self.faults: list[str] = []
        self.reads = 0
        self.enough = threading.Event()
        self._count = threading.Lock()

    def write(self, volume: Direct, first: int, count: int) -> None:
        """The next generation of some blocks, in one write."""
        self.issued[first : first + count] += np.uint64(1)
        words = np.arange(first, first + count, dtype=np.uint64) << np.uint64(32) | self.issued[first : first + count]
        volume.write(first * BLOCK, np.repeat(words, WORDS).tobytes())
        self.answered[first : first + count] = self.issued[first : first + count]

    def keep_writing(self) -> None:
        rng = random.Random(5)
        with Direct(self.path) as volume:
            while not self.enough.is_set():
                count = rng.randint(1, 8)
                self.write(volume, rng.randrange(BLOCKS - count), count)

    def keep_reading(self, seed: int, count: int, goal: int) -> None:
        rng = random.Random(seed)
        with Direct(self.path) as volume:
            while not self.enough.is_set():
                first = rng.randrange(BLOCKS - count + 1)
                lowest = self.answered[first : first + count].copy()
                found = np.frombuffer(volume.read(first * BLOCK, count * BLOCK), dtype=np.uint64).reshape(count, WORDS)
                self._judge(found, first, lowest, self.issued[first : first + count].copy())
                with self._count:
                    self.reads += 1
                    if self.reads >= goal or self.faults:
                        self.enough.set()

    def _judge(
        self, found: NDArray[np.uint64], first: int, lowest: NDArray[np.uint64], highest: NDArray[np.uint64]
    ) -> None:
        whole = (found == found[:, :1]).all(axis=1)
        place = found[:, 0] >> np.uint64(32) == np.arange(first, first + len(found), dtype=np.uint64)
        generation = found[:, 0] & np.uint64(0xFFFFFFFF)
        wrong = ~(whole & place & (lowest <= generation) & (generation <= highest))
        for at in np.flatnonzero(wrong)[:3]:
            self.faults.append(
                f"block {first + at}: {found[at, 0]:#x}, generation {lowest[at]} to {highest[at]} is right"
            )


def read_beside_writes(capture: Capture, goal: int) -> None:
    capture.start()
    blocks = Generations(capture)
    with Direct(blocks.path) as volume:
        for first in range(0, BLOCKS, 128):
            blocks.write(volume, first, 128)
    capture.request("sync")
    # More than there are buffers of either size.
    readers = [(seed, 256) for seed in range(20)] + [(seed, 2) for seed in range(20, 90)]
    threads = [threading.Thread(target=blocks.keep_reading, args=(seed, count, goal)) for seed, count in readers]
    threads.append(threading.Thread(target=blocks.keep_writing))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a read was never answered"
    assert blocks.faults == []
    assert blocks.reads >= goal
    assert capture.stop() == 0


def test_more_reads_at_once_than_there_are_buffers(make_capture: MakeCapture) -> None:
    read_beside_writes(make_capture({"data": BLOCKS * BLOCK}), 4000)


def test_a_backing_that_does_not_know_nowait(make_capture: MakeCapture) -> None:
    """As some device mapper targets and network filesystems; here a tmpfs."""
    place = Path(tempfile.mkdtemp(prefix="pgcdp-test-", dir="/dev/shm"))
    try:
        capture = make_capture({"data": BLOCKS * BLOCK})
        file = place / "data"
        shutil.move(capture.backing("data"), file)
        capture.backing("data").symlink_to(file)
        try:
            os.close(os.open(file, os.O_RDWR | os.O_DIRECT))
        except OSError:
            pytest.skip("this kernel's tmpfs has no direct I/O")
        read_beside_writes(capture, 1000)
    finally:
        shutil.rmtree(place)
