"""Intervals of raw volumes: engine, journal and stages as in service, with made-up checkpoints instead of Postgres.

A volume of its own takes pg_control blocks with a right checksum; each is a boundary. The journal is never released,
so that a model can replay it whole.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import google_crc32c

from pgcdp.capture.control import EngineClient
from pgcdp.capture.journal import Journal
from pgcdp.intervals.increments import Mode
from pgcdp.intervals.stages import Stages, StageSettings
from pgcdp.records import Volume
from pgcdp.recovery.make_way import MakeWay
from pgcdp.recovery.source import Source
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from tests.fix_engine import MIB, Capture, Direct
from tests.raw_workload import Workload
from tests.waiting import wait_until

SYSTEM = 0x6A5B4C3D2E1F0102
VOLUMES = {"data": 8 * MIB, "wal": 4 * MIB, "control": 1 * MIB}


def control_block(checkpoint_lsn: int) -> bytes:
    """8192 bytes as PostgreSQL 15 writes them: what matters, and the checksum over it."""
    head = bytearray(288)
    struct.pack_into("<QII", head, 0, SYSTEM, 1300, 202209061)
    struct.pack_into("<QQI", head, 32, checkpoint_lsn, checkpoint_lsn - 56, 1)
    struct.pack_into("<Q", head, 64, 700 + checkpoint_lsn)
    return bytes(head + struct.pack("<I", google_crc32c.value(bytes(head)))).ljust(8192, b"\0")


class KeepAll:
    """The engine as the stages see it, except that nothing is ever released."""

    def release(self, write: int) -> None:
        """The model wants the whole journal."""

    def durable_write(self) -> int:
        """Nothing is said of what is durable."""
        return 0


class History:
    """A capture under load, followed into a store at `capture.root/store`.

    `raw` are the volumes that raw writers write to, each `pause` seconds after it was answered.
    """

    def __init__(
        self,
        capture: Capture,
        seed: int,
        mode: Mode = "optimal",
        *,
        raw: Sequence[str] = ("data", "wal"),
        pause: float = 0.0,
    ) -> None:
        self.capture = capture
        self.rng = random.Random(seed)
        self.mode: Mode = mode
        self.engine = EngineClient(capture.socket)
        self.checkpoint = 0x1000
        self.fence_after = 30.0
        self.work = Workload(
            [capture.device(name) for name in raw], seed=seed, mark=lambda name: self.engine.mark(name), pause=pause
        )
        volumes = [Volume(i, name, size) for i, (name, size) in enumerate(capture.volumes.items())]
        self.store = Store.create(capture.root / "store", "raw", bytes.fromhex(capture.set_id), volumes)
        self.stages = self.open_stages()

    @property
    def journal(self) -> Journal:
        """The pgcdp reader of the capture's journal."""
        return Journal(self.capture.journal, bytes.fromhex(self.capture.set_id))

    def open_stages(self) -> Stages:
        """Take up the store as the agent does at its start."""
        status = self.engine.status()
        backings = tuple(self.capture.backing(name) for name in self.capture.volumes)
        settings = StageSettings(SYSTEM, backings, self.mode, 3)
        store = Store.open(self.capture.root / "store")
        return Stages.open(
            store,
            self.journal,
            KeepAll(),
            settings,
            make_way=MakeWay(self.fence_after),
            synced=status.synced_write,
            released=status.released_write,
        )

    def write_checkpoint(self) -> None:
        """A new boundary."""
        self.checkpoint += 0x1000
        with Direct(self.capture.device("control")) as volume:
            volume.write(0, control_block(self.checkpoint))

    def repeat_checkpoint(self) -> None:
        """pg_control written for another reason: no boundary."""
        with Direct(self.capture.device("control")) as volume:
            volume.write(0, control_block(self.checkpoint))

    def baseline(self) -> None:
        """Copy the first image while the writers write."""
        stages = self.stages
        assert stages.baseline is not None
        while not stages.baseline.complete:
            stages.baseline_step(self.engine.status().synced_write, 0.002)
        stages.baseline_copied(self.engine.status().applied_write, self.checkpoint)
        self.write_checkpoint()
        wait_until(lambda: stages.finish_baseline(self.engine.status().durable_write), what="the first boundary")
        self.store = stages.store

    def run(self, intervals: int, writes: int = 120) -> None:
        """Load, a checkpoint, load ..., until so many intervals are published; some load stays behind the last."""
        for _ in range(intervals):
            self.work.wait_answered(self.work.answered + self.rng.randint(1, writes))
            self.repeat_checkpoint()
            self.write_checkpoint()
            self.follow()
        self.work.wait_answered(self.work.answered + writes)
        self.follow()

    def follow(self) -> None:
        """What the agent does at each turn."""
        durable = self.engine.status().durable_write
        while self.stages.opened is not None and self.stages.opened.last_write < durable:
            self.stages.follow(durable, lambda checkpoint: "test", {})

    def store_boundary(self) -> int:
        """The write of the newest published boundary."""
        return Bundle.open(self.store, self.store.interval_numbers()[-1]).interval.to_write

    def backing_bytes(self) -> list[bytes]:
        """The production volumes as they are."""
        return [self.capture.backing(name).read_bytes() for name in self.capture.volumes]

    def baseline_bytes(self) -> list[bytes]:
        """The volumes before the first write."""
        return [self.capture.baseline(name).read_bytes() for name in self.capture.volumes]


def source_of(history: History) -> Source:
    """The store with the journal, as they are now."""
    return Source(history.stages.store, history.journal, history.engine.status().durable_write)


def restored(place: Path, volumes: dict[str, int]) -> list[bytes]:
    """What `restore --to-image` made of several volumes."""
    return [(place / f"{name}.img").read_bytes() for name in volumes]
