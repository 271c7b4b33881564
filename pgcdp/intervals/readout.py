"""What the engine reads in the WAL of captured writes: runs `pgcdp-engine wal` and takes its tables (FORMAT.md 4.1)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.engine import run_engine
from pgcdp.postgres.wal import Note, read_notes
from pgcdp.records import CHANGE, END, WAL_WRITE
from pgcdp.units import format_lsn

SEGMENT_BYTES = 16 << 20
"""wal_segment_size unless the settings say another."""


@dataclass(frozen=True, slots=True)
class Readout:
    """Arrays END, CHANGE (those of each end in turn), u4 (subxids, likewise), WAL_WRITE; records of interest.

    `running`: xids, those of subtransactions too, that changed something and have not ended.
    """

    ends: NDArray[np.void]
    changes: NDArray[np.void]
    subxids: NDArray[np.uint32]
    wal: NDArray[np.void]
    notes: list[Note]
    running: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Whose WAL it is. `holes`: wal_init_zero is off; `images`: copies of the volumes, in order of their numbers."""

    system_identifier: int
    segment_bytes: int = SEGMENT_BYTES
    holes: bool = False
    images: tuple[Path, ...] = ()


def read_wal(
    cluster: Cluster,
    intervals: Sequence[Path],
    *,
    start_lsn: int = 0,
    behind: int = 0,
    state: Path | None = None,
    save_state: Path | None = None,
    journal: Path | None = None,
    upto: int | None = None,
    settle_upto: int | None = None,
) -> Readout:
    """Read the WAL in the writes of interval directories, then of a journal, up to write `upto`.

    With wal_init_zero off, WAL may be durable only with a write behind that one: it is looked for up to `settle_upto`.
    It begins behind write `behind`, with the first record behind `start_lsn`, or goes on from what another run saved as
    `state`. Raises what the engine says: DamageError, or PreconditionError when the journal does not hold the next
    write any more.
    """
    words = [
        "wal",
        "--system-identifier",
        str(cluster.system_identifier),
        "--segment-bytes",
        str(cluster.segment_bytes),
    ]
    if start_lsn:
        words += ["--start-lsn", format_lsn(start_lsn)]
    if cluster.holes:
        words.append("--wal-holes")
        for number, image in enumerate(cluster.images):
            words += ["--image", f"{number}={image}"]
    options: dict[str, Any] = {
        "--behind": behind or None,
        "--state": state,
        "--save-state": save_state,
        "--journal": journal,
        "--upto": upto,
    }
    options["--settle-upto"] = settle_upto
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    with tempfile.TemporaryDirectory(prefix="pgcdp-wal-") as place:
        run_engine([*words, "--out", place, *map(os.fspath, intervals)])
        return Readout(
            np.fromfile(Path(place, "ends"), dtype=END),
            np.fromfile(Path(place, "changes"), dtype=CHANGE),
            np.fromfile(Path(place, "subxids"), dtype=np.uint32),
            np.fromfile(Path(place, "wal"), dtype=WAL_WRITE),
            read_notes(Path(place, "notes").read_bytes()),
            np.fromfile(Path(place, "running"), dtype=np.uint32),
        )


def read_nothing() -> Readout:
    """The readout of no write at all."""
    none = np.empty(0, np.uint32)
    return Readout(np.empty(0, END), np.empty(0, CHANGE), none, np.empty(0, WAL_WRITE), [], none)
