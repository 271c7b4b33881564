"""What the engine reads in the WAL of captured writes: runs `pgcdp-engine wal` and takes its tables (FORMAT.md 4.1)."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.engine import run_engine
from pgcdp.errors import PgcdpError
from pgcdp.fsio import bytes_in, read_file, write_all, write_file
from pgcdp.postgres.wal import Note, first_notes
from pgcdp.proc import ProcessFailed
from pgcdp.records import CHANGE, END, WAL_WRITE
from pgcdp.units import format_lsn, format_size

SEGMENT_BYTES = 16 << 20
"""wal_segment_size unless the settings say another."""
FLOOR_SECONDS = 300.0
BYTES_PER_SECOND = 1 << 20
"""How long the engine may take at most, by the bytes on disk that it reads: it reads hundreds of times as fast."""
NOTES = 500_000
"""How many records about names of relations are taken: as 60,000 new tables have, and some 300 MB of memory."""


class SlowError(PgcdpError):
    """The engine did not end in its time, and was killed."""


@dataclass(frozen=True, slots=True)
class Readout:
    """Arrays END, CHANGE (those of each end in turn), u4 (subxids, likewise), WAL_WRITE; records of interest.

    `running`: xids, those of subtransactions too, that changed something and have not ended. `left_out`: how many
    records about names of relations are not in `notes`, because there were more than NOTES.
    """

    ends: NDArray[np.void]
    changes: NDArray[np.void]
    subxids: NDArray[np.uint32]
    wal: NDArray[np.void]
    notes: list[Note]
    running: NDArray[np.uint32]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Cluster:
    """Whose WAL it is. `holes`: wal_init_zero is off; `images`: copies of the volumes, in order of their numbers.

    `superblocks`: of encrypted images the first block of each, None where it is not known.
    """

    system_identifier: int
    segment_bytes: int = SEGMENT_BYTES
    holes: bool = False
    images: tuple[Path, ...] = ()
    superblocks: tuple[bytes | None, ...] = ()


def read_wal(
    cluster: Cluster,
    intervals: Sequence[Path],
    *,
    tables: Path,
    start_lsn: int = 0,
    behind: int = 0,
    state: Path | None = None,
    save_state: Path | None = None,
    journal: Path | None = None,
    upto: int | None = None,
    settle_upto: int | None = None,
    key: bytes | None = None,
) -> Readout:
    """Read the WAL in the writes of interval directories, then of a journal, up to write `upto`.

    With wal_init_zero off, WAL may be durable only with a write behind that one: it is looked for up to `settle_upto`.
    It begins behind write `behind`, with the first record behind `start_lsn`, or goes on from what another run saved as
    `state`. The engine's tables lie in the new directory `tables` meanwhile. `key`: the data key of the encrypted store
    that the intervals are of; both states are encrypted then, and `tables` must not lie in it. Raises what the engine
    says: DamageError, or PreconditionError when the journal does not hold the next write any more; SlowError.
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
        for number, image in enumerate(cluster.images if key is None else ()):
            words += ["--image", f"{number}={image}"]
    options: dict[str, Any] = {
        "--behind": behind or None,
        "--state": state if key is None else None,
        "--save-state": save_state if key is None else None,
        "--journal": journal,
        "--upto": upto,
    }
    options["--settle-upto"] = settle_upto
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    with _place(tables) as place, ExitStack() as stack:
        kept = list[int]()
        saved = place / "state" if key is not None and save_state is not None else None
        if key is not None:
            words += [] if state is None else ["--state", _given(read_file(state), stack, kept)]
            words += [] if saved is None else ["--save-state", os.fspath(saved)]
            for number, block in enumerate(cluster.superblocks if cluster.holes else ()):
                words += [] if block is None else ["--image", f"{number}={_given(block, stack, kept)}"]
        words += ["--out", os.fspath(place), *map(os.fspath, intervals)]
        _run(words, _bytes_in(intervals, journal), key, kept)
        if saved is not None and save_state is not None:
            write_file(save_state, saved.read_bytes())
        notes, left_out = _notes(place / "notes")
        return Readout(
            np.fromfile(place / "ends", dtype=END),
            np.fromfile(place / "changes", dtype=CHANGE),
            np.fromfile(place / "subxids", dtype=np.uint32),
            np.fromfile(place / "wal", dtype=WAL_WRITE),
            notes,
            np.fromfile(place / "running", dtype=np.uint32),
            left_out,
        )


@contextmanager
def _place(tables: Path) -> Iterator[Path]:
    shutil.rmtree(tables, ignore_errors=True)  # a killed agent left it
    tables.mkdir()
    try:
        yield tables
    finally:
        shutil.rmtree(tables)


def _given(content: bytes, stack: ExitStack, kept: list[int]) -> str:
    """A path by which the engine reads this from memory; its descriptor is added to those that it inherits."""
    fd = os.memfd_create("pgcdp", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    kept.append(fd)
    write_all(fd, content, 0)
    return f"/proc/self/fd/{fd}"


def _run(words: Sequence[str], size: int, key: bytes | None, kept: Sequence[int]) -> None:
    seconds = FLOOR_SECONDS + size / BYTES_PER_SECOND
    try:
        run_engine(words, seconds, key=key, keep_fds=kept)
    except ProcessFailed:
        raise SlowError(f"reading the WAL in {format_size(size)} of writes took more than {seconds:.0f} s") from None


def _bytes_in(intervals: Sequence[Path], journal: Path | None) -> int:
    """On disk."""
    files = [place / "writes" for place in intervals]
    files += sorted(journal.glob("*.seg")) if journal is not None else []
    return bytes_in(files)


def _notes(path: Path) -> tuple[list[Note], int]:
    with path.open("rb") as file:
        if not path.stat().st_size:
            return [], 0
        return first_notes(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), NOTES)


def read_nothing() -> Readout:
    """The readout of no write at all."""
    none = np.empty(0, np.uint32)
    return Readout(np.empty(0, END), np.empty(0, CHANGE), none, np.empty(0, WAL_WRITE), [], none)
