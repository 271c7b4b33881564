"""Which captured writes are the delicate ones: where a recovery point most likely goes wrong.

Found by the bytes of the writes and by the filesystem's own word for where its log lies; nothing here trusts pgcdp's
idea of a write.
"""

from __future__ import annotations

import random
import re
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from pgcdp.postgres.control import find_control_blocks
from pgcdp.recovery.source import Source
from pgcdp.store.bundle import Bundle

LONG_HEADER = 0x0002
WAL_MAGICS = {0xD106, 0xD10D, 0xD110, 0xD113, 0xD116, 0xD118}
"""xlp_magic of 13 to 18."""


def log_ranges(device: str, fs: str) -> list[tuple[int, int]]:
    """Byte ranges of the filesystem's log on its device."""
    if fs == "ext4":
        out = subprocess.run(
            ["debugfs", "-R", "stat <8>", device], check=True, capture_output=True, text=True
        ).stdout  # fmt: skip
        return [
            (int(first) * 4096, (int(last or first) + 1) * 4096)
            for first, last in re.findall(r"\):(\d+)(?:-(\d+))?", out.split("EXTENTS:")[1])
        ]
    out = subprocess.run(
        ["xfs_db", "-r", "-c", "sb 0", "-c", "p logstart logblocks agblocks agblklog", device],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    field = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", out)}
    group, block = divmod(field["logstart"], 1 << field["agblklog"])
    start = (group * field["agblocks"] + block) * 4096
    return [(start, start + field["logblocks"] * 4096)]


class Moments:
    """Numbers of delicate writes by kind, from everything restorable behind boundary 0."""

    def __init__(self, source: Source, volumes: Sequence[tuple[str, str]], system_identifier: int) -> None:
        """`volumes`: device and filesystem of each, in order."""
        self.first = source.base().write
        self.newest = self.first
        self._logs = [log_ranges(device, fs) for device, fs in volumes]
        self._system = system_identifier
        self.found: dict[str, list[int]] = {
            kind: [] for kind in ("pg_control", "log", "log end", "wal switch", "catalogs", "batch end", "boundary")
        }
        before = ""
        for number, volume, offset, data in _writes(source):
            kind = self._kind(volume, offset, data)
            if before == "log" and kind != "log":
                self.found["log end"].append(number - 1)
            before = kind
            if kind:
                self.found[kind].append(number)
            self.newest = number
        self.found["boundary"] = [interval.to_write for interval in source.intervals()]
        assert source.journal is not None
        for run in source.journal.batches(self._tail(source), self.newest):
            self.found["batch end"] += run.batch_ends.tolist()

    @staticmethod
    def _tail(source: Source) -> int:
        intervals = source.intervals()
        return intervals[-1].to_write if intervals else source.base().write

    def _kind(self, volume: int, offset: int, data: bytes) -> str:
        if volume < len(self._logs) and any(begin <= offset < end for begin, end in self._logs[volume]):
            return "log"
        if len(data) >= 4096:
            import numpy as np

            if find_control_blocks(np.frombuffer(data[:4096], dtype=np.uint8), self._system):
                return "pg_control"
            magic, info = struct.unpack_from("<HH", data)
            if magic in WAL_MAGICS and info & LONG_HEADER:
                return "wal switch"
            if magic not in WAL_MAGICS and offset < 64 << 20 and len(data) == 4096:
                return "catalogs"
        return ""

    def choose(self, count: int, rng: random.Random) -> list[int]:
        """Half of them at, just before or just after delicate writes of every kind in turn, the others anywhere."""
        kinds = [kind for kind, numbers in self.found.items() if numbers]
        chosen: set[int] = set()
        for i in range(count // 2 + 1):
            number = rng.choice(self.found[kinds[i % len(kinds)]]) + rng.choice((-1, 0, 1))
            chosen.add(min(max(number, self.first), self.newest))
        while len(chosen) < count:
            chosen.add(rng.randint(self.first, self.newest))
        return sorted(chosen)


def _writes(source: Source) -> Iterator[tuple[int, int, int, bytes]]:
    """(number, volume, offset, data) of all writes behind boundary 0 that are stored or in the journal."""
    last = source.base().write
    for interval in source.intervals():
        bundle = Bundle.open(source.store, interval.number)
        with bundle.writes() as writes:
            for entry in bundle.index():
                yield (
                    int(entry["number"]),
                    int(entry["volume"]),
                    int(entry["offset"]),
                    writes.read(int(entry["position"]), int(entry["data_length"])),
                )
        last = interval.to_write
    assert source.journal is not None
    for run in source.journal.batches(last, source.durable_write):
        for i, record in enumerate(run.records):
            yield int(record["number"]), int(record["volume"]), int(record["offset"]), run.data_of(i).tobytes()


def scratch_below(root: Path) -> Path:
    """Where a test restores to: enterable by postgres."""
    place = root / "points"
    place.mkdir(mode=0o711, exist_ok=True)
    return place
