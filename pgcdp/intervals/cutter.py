"""Where boundaries are: a captured write whose pg_control names a newer checkpoint than all before it.

pg_control is also written for other reasons (recovery's minimum point, a changed state): those repeat the checkpoint
and are no boundaries. Recognised by system identifier and CRC in the first bytes of a block (postgres/control).

A rewind in place writes back an earlier pg_control, or undoing another one a later one: nothing between its begin and
its end record is a boundary, and what follows is compared with the checkpoint that was written back. So it is with
what was changed while nobody captured it, and is taken in between the begin and end record of a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.journal import BatchRun
from pgcdp.postgres.control import Control, find_control_blocks
from pgcdp.records import BLOCK, GAP_BEGIN, GAP_END, REWIND_BEGIN, Boundary, Kind
from pgcdp.store.frames import FrameReader


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint complete on the volumes with write `write`, captured at `time_ns`."""

    write: int
    time_ns: int
    control: Control

    def boundary(self, number: int, reason: str) -> Boundary:
        """The boundary that ends interval `number` here."""
        return Boundary(
            number=number,
            write=self.write,
            time_ns=self.time_ns,
            checkpoint_lsn=self.control.checkpoint_lsn,
            redo_lsn=self.control.redo_lsn,
            timeline=self.control.timeline,
            next_xid=self.control.next_xid,
            reason=reason,
        )


class CheckpointFinder:
    """Finds checkpoints in the stream of writes, which must be given to it in order and without gaps.

    `checkpoint_lsn` is the newest checkpoint already known: that of the last boundary, or what Postgres says.
    """

    def __init__(self, system_identifier: int, checkpoint_lsn: int) -> None:
        self.system_identifier = system_identifier
        self.checkpoint_lsn = checkpoint_lsn
        self.back: tuple[int, int] | None = None
        self.rewound = -1  # the end record of the newest rewind or gap that was seen
        self.healed = -1  # ... of the newest gap in which changes were tracked
        self._inside = False
        self._written_back = 0

    def go_back(self, write: int, checkpoint_lsn: int) -> None:
        """Behind `write` this is the newest checkpoint, though a newer one was captured before."""
        self.back = write, checkpoint_lsn

    def passed(self, checkpoint_lsn: int) -> bool:
        """Whether that checkpoint, or a later one, was seen."""
        return self.back is None and self.checkpoint_lsn >= checkpoint_lsn

    def scan(self, run: BatchRun) -> list[Checkpoint]:
        """The new checkpoints in a run, in order."""
        rows = np.flatnonzero(_between(run.records)).tolist()
        seen: list[tuple[int, Control | None]] = [(row, None) for row in rows]
        for row in rows:
            self._see_end(run.records[row], run.data_of(row).tobytes())
        for position, control in find_control_blocks(run.data, self.system_identifier):
            seen.append((int(np.searchsorted(run.data_offsets, position, side="right")) - 1, control))
        seen.sort(key=lambda each: each[0])
        taken = [self._take(run.records[row], control) for row, control in seen]
        return [checkpoint for checkpoint in taken if checkpoint is not None]

    def scan_stored(self, index: NDArray[np.void], writes: FrameReader) -> list[Checkpoint]:
        """The same for writes that are already in an open interval: what a restart passes over otherwise."""
        found = []
        for entry in index[((index["kind"] == Kind.WRITE) & (index["data_length"] % BLOCK == 0)) | _between(index)]:
            data = writes.read(int(entry["position"]), int(entry["data_length"]))
            if entry["kind"] == Kind.MARK:
                self._see_end(entry, data)
                self._take(entry, None)
                continue
            for _, control in find_control_blocks(np.frombuffer(data, dtype=np.uint8), self.system_identifier):
                checkpoint = self._take(entry, control)
                if checkpoint is not None:
                    found.append(checkpoint)
        return found

    def _see_end(self, record: np.void, name: bytes) -> None:
        if record["flags"] == GAP_END and name.startswith(b"untracked "):
            self.healed = int(record["number"])

    def _take(self, record: np.void, control: Control | None) -> Checkpoint | None:
        """`control` is None for the begin or end record of a rewind or gap."""
        if control is None:
            self._pass(int(record["flags"]), int(record["number"]))
            return None
        if self._inside:  # several blocks may look like it: a checkpoint too high is mended by `go_back`
            self._written_back = max(self._written_back, control.checkpoint_lsn)
            return None
        if self.back is not None and record["number"] > self.back[0]:
            self.checkpoint_lsn, self.back = min(self.checkpoint_lsn, self.back[1]), None
        # Not newer: written for another reason, or a copy of an older pg_control somewhere on the volume.
        if record["kind"] != Kind.WRITE or control.checkpoint_lsn <= self.checkpoint_lsn:
            return None
        self.checkpoint_lsn = control.checkpoint_lsn
        return Checkpoint(int(record["number"]), int(record["wall_ns"]), control)

    def _pass(self, flags: int, write: int) -> None:
        if flags in (REWIND_BEGIN, GAP_BEGIN):
            self._inside = True
        elif self._inside:
            self._inside, self.rewound = False, write
            self.checkpoint_lsn, self._written_back = self._written_back or self.checkpoint_lsn, 0


def _between(records: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which are begin or end records, of rewinds or gaps."""
    found: NDArray[np.bool_] = (records["kind"] == Kind.MARK) & (records["flags"] != 0)
    return found
