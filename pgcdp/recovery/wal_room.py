"""Room for WAL in a sandbox whose volume is full, as production's was at that point: Postgres could not even recover.

Its pg_wal goes to the sandbox's scratch directory, on a disk of this machine; what it took in the data directory is
free then.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pgcdp.errors import PreconditionError
from pgcdp.fsio import free_space
from pgcdp.postgres.control import Control
from pgcdp.proc import User
from pgcdp.units import format_size

SEGMENTS = 8
"""With room for fewer the WAL moves: recovery ends with a checkpoint, and whoever looks at it writes a little, too."""
_NAME = re.compile(r"[0-9A-F]{8}([0-9A-F]{8})([0-9A-F]{8})")


def give_wal_room(pgdata: Path, scratch: Path, user: User, control: Control) -> None:
    """Move pg_wal of a private copy below `scratch` if its filesystem is nearly full.

    Segments before the one that recovery begins in stay behind. Raises PreconditionError when there is no room
    for it either; nothing is changed then.
    """
    wal = Path(os.path.realpath(pgdata / "pg_wal"))
    spare = SEGMENTS * control.wal_segment_size
    if free_space(wal) >= spare:
        return
    files = [file for file in wal.rglob("*") if file.is_file() and not _is_past(file.name, control)]
    need = sum(file.stat().st_size for file in files) + spare
    if free_space(scratch) < need:
        raise PreconditionError(
            f"the volume is full at this point, and {scratch.parent} has {format_size(free_space(scratch))} free for "
            f"its WAL, which may take {format_size(need)}",
            "make room there",
        )
    own = scratch / "pg_wal"
    for directory in (own, own / "archive_status"):
        directory.mkdir(mode=0o700)
        os.chown(directory, user.uid, user.gid)
    for file in files:
        copy = own / file.relative_to(wal)
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(file, copy, follow_symlinks=False)
        for path in (copy, copy.parent):
            os.chown(path, user.uid, user.gid)
    place = pgdata / "pg_wal"
    place.unlink() if place.is_symlink() else shutil.rmtree(place)
    place.symlink_to(own)


def _is_past(name: str, control: Control) -> bool:
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    size = control.wal_segment_size
    number = int(match[1], 16) * ((1 << 32) // size) + int(match[2], 16)
    return number < control.redo_lsn // size
