"""Seeded random writers on raw volumes, and the check of what a journal says about them afterwards.

Several threads write, zero, discard and mark, in ranges of their own and in one that all share. Each block says who
wrote it: writer, counter, time of issue, volume, place, checksum. Each operation is logged with the boot clock before
it was issued and after it was answered, the clock that the engine stamps records with: so it can be checked that
A answered before B was issued means number(A) < number(B).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import struct
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from pgcdp.errors import PgcdpError
from tests.fix_engine import Direct
from tests.model import BLOCK, DISCARD, MARK, WRITE, ZERO
from tests.model import Write as Record
from tests.waiting import wait_until

HEADER = struct.Struct("<8sIIQQQHH4xQ")  # magic, writer, block in operation, counter, issued, block, volume, kind, sum
MAGIC = b"RAWBLOCK"
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
GONE = {
    errno.EIO,
    errno.ENOTCONN,
    errno.ECONNABORTED,
    errno.ENODEV,
    errno.ENOENT,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EPIPE,
}
"""What an operation ends with when the engine is killed under it."""

_libc = ctypes.CDLL(None, use_errno=True)


def now() -> int:
    """The boot clock in ns."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@dataclass
class Op:
    """One operation. `answered` is 0 when it never was; `ended` is when the writer learnt its end either way."""

    writer: int
    counter: int
    kind: int
    volume: int = 0
    offset: int = 0
    length: int = 0
    issued: int = 0
    answered: int = 0
    ended: int = 0
    numbers: list[int] = field(default_factory=list)
    """Write numbers that the journal gave it (filled by `match`)."""

    @property
    def name(self) -> str:
        """Of a mark."""
        return f"mark {self.writer}/{self.counter}"


def make_blocks(op: Op, rng: random.Random) -> bytes:
    """The bytes of a write, each block self-describing."""
    out = bytearray()
    first = op.offset // BLOCK
    for i in range(op.length // BLOCK):
        fill = rng.randbytes(8) * ((BLOCK - HEADER.size) // 8)
        place = (op.writer, i, op.counter, op.issued, first + i, op.volume, op.kind)
        block = bytearray(HEADER.pack(MAGIC, *place, 0) + fill)
        struct.pack_into("<Q", block, HEADER.size - 8, xxhash.xxh3_64_intdigest(block))
        out += block
    return bytes(out)


def read_block(block: bytes | bytearray | memoryview) -> tuple[int, int, int, int, int, int] | None:
    """(writer, counter, block in operation, issued, volume, block) of a block; None for zeros. ValueError otherwise."""
    if not any(block[: HEADER.size]) and not any(block):
        return None
    magic, writer, i, counter, issued, place, volume, _, checksum = HEADER.unpack_from(block)
    blank = bytearray(block)
    blank[HEADER.size - 8 : HEADER.size] = bytes(8)
    if magic != MAGIC or xxhash.xxh3_64_intdigest(blank) != checksum:
        raise ValueError("a block that no writer wrote")
    return writer, counter, i, issued, volume, place


def erase(fd: int, kind: int, offset: int, length: int, *, device: bool) -> None:
    """Zeroes or discards a range of a volume's file or block device. OSError."""
    if device:
        fcntl.ioctl(fd, BLKZEROOUT if kind == ZERO else BLKDISCARD, struct.pack("<QQ", offset, length))
        return
    mode = (ZERO_RANGE if kind == ZERO else PUNCH_HOLE) | KEEP_SIZE
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Workload:
    """`writers` threads on the volumes at `paths` (files of the engine or loop devices over them).

    Writer w may write anywhere in the first half of each volume, and in its own stripe of the second half; what it
    wrote in its stripe it reads back at once, unless `reads_back` is false: where a disk loses what it had, a read that
    is under way may tell so. `mark` sends a mark, None leaves marks out. `pause`: seconds between two operations of a
    writer.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        seed: int,
        writers: int = 4,
        mark: Callable[[str], object] | None = None,
        max_blocks: int = 64,
        first_writer: int = 0,
        pause: float = 0.0,
        reads_back: bool = True,
    ) -> None:
        self.paths = list(paths)
        self.seed = seed
        self.writers = range(first_writer, first_writer + writers)
        self.mark = mark
        self.max_blocks = max_blocks
        self.pause = pause
        self.reads_back = reads_back
        self.device = self.paths[0].is_block_device()
        self.sizes = [self._size(path) for path in self.paths]
        self.log: list[list[Op]] = [[] for _ in self.writers]
        self._answered = [0 for _ in self.writers]
        self.wrong: list[str] = []
        self.stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @staticmethod
    def _size(path: Path) -> int:
        with path.open("rb") as file:
            return file.seek(0, os.SEEK_END)

    @property
    def ops(self) -> list[Op]:
        return [op for log in self.log for op in log]

    @property
    def answered(self) -> int:
        """Operations answered so far."""
        return sum(self._answered)

    def start(self, operations: int | None = None) -> None:
        """Starts the writers; each ends after so many operations, at `stop`, or when the engine dies under it."""
        for i in range(len(self.writers)):
            thread = threading.Thread(target=self._run, args=(i, operations), daemon=True)
            self._threads.append(thread)
            thread.start()

    def join(self, timeout: float = 120.0) -> None:
        """Waits for the writers' end; AssertionError when one read what it did not write, or hangs."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"a writer hangs after {timeout} s"
        assert not self.wrong, self.wrong

    def ended(self) -> bool:
        """Whether every writer has ended."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait_answered(self, count: int, timeout: float = 120.0) -> None:
        """Waits until so many operations are answered."""
        wait_until(lambda: self.answered >= count, timeout=timeout, interval=0.001, what=f"{count} operations")

    def run(self, operations: int) -> None:
        self.start(operations)
        self.join()

    def finish(self) -> None:
        """Tells the writers to stop, and waits for them."""
        self.stop.set()
        self.join()

    def _run(self, index: int, operations: int | None) -> None:
        rng = random.Random(self.seed * 1000 + self.writers[index])
        try:
            files = [Direct(path) for path in self.paths]
        except OSError as error:
            if error.errno not in GONE:
                self.wrong.append(f"writer {self.writers[index]}: {error}")
            return
        counter = 0
        try:
            while not self.stop.wait(self.pause) and (operations is None or counter < operations):
                counter += 1
                self._one(index, counter, rng, files)
        except OSError as error:
            if self.log[index] and not self.log[index][-1].ended:
                self.log[index][-1].ended = now()
            if error.errno not in GONE:
                self.wrong.append(f"writer {self.writers[index]}, operation {counter}: {error}")
        finally:
            for file in files:
                os.close(file.fd)

    def _one(self, index: int, counter: int, rng: random.Random, files: list[Direct]) -> None:
        kind = rng.choices([WRITE, ZERO, DISCARD, MARK], [88, 5, 5, 2 if self.mark else 0])[0]
        op = Op(self.writers[index], counter, kind)
        own = False
        if kind != MARK:
            op.volume = rng.randrange(len(files))
            own = self._place(op, index, rng)
        op.issued = now()
        data = make_blocks(op, rng) if kind == WRITE else b""
        self.log[index].append(op)
        if kind == WRITE:
            files[op.volume].write(op.offset, data)
        elif kind == MARK:
            if not self._mark(op.name):
                op.ended = now()
                return
        else:
            erase(files[op.volume].fd, kind, op.offset, op.length, device=self.device)
            data = bytes(op.length)
        op.answered = op.ended = now()
        self._answered[index] += 1
        if own and self.reads_back and files[op.volume].read(op.offset, op.length) != data:
            self.wrong.append(f"writer {op.writer} read at {op.offset} of volume {op.volume} what it did not write")

    def _mark(self, name: str) -> bool:
        """Whether it is there for certain: a mark is refused while writes wait, as they do for a slow disk."""
        assert self.mark is not None
        try:
            told = self.mark(name)
        except PgcdpError:
            return False
        return not (isinstance(told, dict) and "error" in told)

    def _place(self, op: Op, index: int, rng: random.Random) -> bool:
        """Chooses the range of an operation; whether it is the writer's own."""
        blocks = self.sizes[op.volume] // BLOCK
        half = blocks // 2
        stripe = half // len(self.writers)
        own = rng.random() < 0.5
        low, high = (half + index * stripe, half + (index + 1) * stripe) if own else (0, half)
        count = min(high - low, rng.choice([1, 1, 1, 2, 4, rng.randint(1, self.max_blocks)]))
        op.offset = rng.randint(low, high - count) * BLOCK
        op.length = count * BLOCK
        return own


def match(ops: Iterable[Op], records: Iterable[Record]) -> list[str]:
    """Gives each operation the numbers that the journal gave it. Returns what is wrong, in words."""
    wrong: list[str] = []
    lengths: dict[int, int] = {}
    by_name = {(op.writer, op.counter): op for op in ops}
    marks = {op.name: op for op in by_name.values() if op.kind == MARK}
    erasures: dict[tuple[int, int], list[Op]] = defaultdict(list)
    for op in by_name.values():
        if op.kind in (ZERO, DISCARD):
            erasures[op.volume, op.kind].append(op)
    # Of two that cover a record, the tighter one: the other has its own. Of the same blocks, the one that ends first: a
    # later record cannot be its.
    for candidates in erasures.values():
        candidates.sort(key=lambda op: (op.length, op.ended))
    for record in records:
        found: Op | None
        lengths[record.number] = record.length
        if record.kind == WRITE:
            found = _match_write(record, by_name, wrong)
        elif record.kind == MARK:
            found = marks.get(record.data.decode())
        else:
            found = _match_erasure(record, erasures[record.volume, record.kind], lengths)
        if found is None:
            wrong.append(f"write {record.number}, kind {record.kind}: nobody did it")
            continue
        found.numbers.append(record.number)
        if not found.issued <= record.boot_ns <= found.ended:
            wrong.append(f"write {record.number} is stamped outside the time of its operation")
    wrong += [
        f"{op} was answered and is not in the journal" for op in by_name.values() if op.answered and not op.numbers
    ]
    return wrong


def _match_write(record: Record, ops: dict[tuple[int, int], Op], wrong: list[str]) -> Op | None:
    found: Op | None = None
    for i in range(0, record.length, BLOCK):
        who = read_block(record.data[i : i + BLOCK])
        op = ops.get(who[:2]) if who else None
        if who is None or op is None or (found and op is not found):
            return None
        place = (op.volume, op.offset // BLOCK + who[2])
        if who[4:] != place or place != (record.volume, (record.offset + i) // BLOCK):
            wrong.append(
                f"write {record.number} put block {who[4:]} at {(record.volume, (record.offset + i) // BLOCK)}"
            )
        found = op
    return found


def _match_erasure(record: Record, candidates: list[Op], lengths: dict[int, int]) -> Op | None:
    """The operation under way at the record's time that covers its range; rather an answered one that lacks it."""
    end = record.offset + record.length
    best: Op | None = None
    for op in candidates:
        covers = op.offset <= record.offset and end <= op.offset + op.length
        if not covers or not op.issued <= record.boot_ns <= op.ended:
            continue
        if op.answered and sum(lengths[n] for n in op.numbers) + record.length <= op.length:
            return op
        best = best if best and not best.answered else op
    return best


def order_faults(ops: Iterable[Op]) -> list[str]:
    """Pairs with A answered before B was issued, but number(A) > number(B)."""
    known = [op for op in ops if op.numbers]
    ended = sorted((op for op in known if op.answered), key=lambda op: op.answered)
    times = [op.answered for op in ended]
    highest: list[Op] = []
    for op in ended:
        highest.append(op if not highest or max(op.numbers) > max(highest[-1].numbers) else highest[-1])
    wrong = []
    for op in known:
        before = bisect_left(times, op.issued)
        if before and max(highest[before - 1].numbers) > min(op.numbers):
            wrong.append(f"{highest[before - 1]} was answered before {op} was issued")
    return wrong


def coverage_faults(ops: Iterable[Op], records: Iterable[Record], resent: bool = False) -> list[str]:
    """Answered operations whose records do not cover their whole range, each part once; `resent`: at least once."""
    if resent:
        ranges = {record.number: range(record.offset, record.offset + record.length, BLOCK) for record in records}
        return [
            f"{op}: the journal lacks blocks of it"
            for op in ops
            if op.answered
            and op.kind != MARK
            and {at for n in op.numbers for at in ranges[n]} != set(range(op.offset, op.offset + op.length, BLOCK))
        ]
    lengths = {record.number: record.length for record in records}
    return [
        f"{op}: the journal has {sum(lengths[n] for n in op.numbers)} bytes of it"
        for op in ops
        if op.answered and op.kind != MARK and sum(lengths[n] for n in op.numbers) != op.length
    ]


def assert_history(ops: Sequence[Op], records: Sequence[Record], resent: bool = False) -> None:
    """Everything that can be said of a journal that holds all the writes of these operations, and no others.

    `resent`: it may hold one twice, whose first record was durable and not answered when its engine died.
    """
    faults = match(ops, records) + order_faults(ops) + coverage_faults(ops, records, resent)
    assert not faults, "\n".join(faults[:20])
