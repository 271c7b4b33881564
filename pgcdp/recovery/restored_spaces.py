"""Tablespaces of a data directory that is restored: where each goes, and what would lead back to production's.

A restored cluster that is started beside production must not touch production's tablespaces: they bear the same files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from pgcdp import proc
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.postgres import cluster
from pgcdp.postgres.control import Control
from pgcdp.postgres.timelines import segment_name
from pgcdp.units import format_lsn

_CREATE = re.compile(r"desc: CREATE (\d+) \"?(.*?)\"?\s*$")


@dataclass(frozen=True, slots=True)
class Restored:
    """A tablespace: `copy` is where it is mounted, `place` where it goes. `name` is None when it is not known."""

    oid: int
    name: str | None
    copy: Path
    place: Path


def refuse_shared(wanted: Mapping[str, Path], place: Path, beside: Path) -> None:
    """Raises UsageError unless each tablespace, by name or OID, has a directory of its own, in no other's."""
    taken = {"the data directory": place, "the tablespaces without a directory": beside}
    for word, directory in wanted.items():
        for other, there in taken.items():
            if directory.is_relative_to(there) or there.is_relative_to(directory):
                raise UsageError(
                    f"{directory} for tablespace {word} and {there} for {other} lie in each other",
                    "give each a directory of its own",
                )
        taken[word] = directory


def planned(
    links: Mapping[Path, Path],
    found: Path,
    settings: Mapping[str, Any] | None,
    wanted: Mapping[str, Path],
    place: Path,
    beside: Path,
) -> list[Restored]:
    """What becomes of the tablespaces among `links` (`links.own_places`) of the mounted `found`, in order of OID.

    One that lies in the data directory itself stays there. Raises UsageError for a name in `wanted` that is none, or a
    directory that cannot be used.
    """
    names = {int(space["oid"]): str(space["name"]) for space in (settings or {}).get("tablespaces", ())}
    oids = {int(link.name): own for link, own in links.items() if link.parent == found / "pg_tblspc"}
    chosen: dict[int, Path] = {}
    for word, directory in wanted.items():
        matching = [oid for oid in oids if word in (str(oid), names.get(oid))]
        if not matching:
            known = ", ".join(f"{names.get(oid, '?')} ({oid})" for oid in sorted(oids)) or "none"
            raise UsageError(f'there is no tablespace "{word}" at this point', f"there are: {known}")
        if not directory.parent.is_dir():
            raise UsageError(f"{directory.parent} is no directory", f"make it first: mkdir -p {directory.parent}")
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UsageError(f"{directory} is not empty", "name a directory that does not exist, or remove it first")
        if matching[0] in chosen:
            raise UsageError(f"tablespace {word} is named twice", "by its name or by its OID")
        chosen[matching[0]] = directory
    restored = []
    for oid, own in sorted(oids.items()):
        inside = place / own.relative_to(found) if own.is_relative_to(found) else None
        restored.append(Restored(oid, names.get(oid), own, chosen.get(oid) or inside or beside / str(oid)))
    return restored


def refuse_created(found: Path, wal: Path, binaries: cluster.Binaries | None, production: Path) -> None:
    """Raises PreconditionError when recovery of the mounted `found`, with its WAL in `wal`, would make a tablespace.

    The record bears production's path: a Postgres that replays it links to it again, whatever was restored. Raised
    also when that cannot be told, unless `production`, its data directory, is not on this machine: nothing of it can
    be written then.
    """
    try:
        made = created(found, wal, binaries)
    except PreconditionError as error:
        if not production.exists():
            return
        raise PreconditionError(
            f"whether recovery of this point makes a tablespace in production's place is not known: {error.message}",
            error.hint or "pgcdp clone opens this point, or restore it with --to-image",
        ) from None
    for oid, location in made.items():
        raise PreconditionError(
            f"recovery of this point makes tablespace {oid} in {location}, production's own: a copy that is started "
            "would write there",
            "choose a point behind the next boundary, or before it was made; pgcdp clone opens this one",
        )


def created(found: Path, wal: Path, binaries: cluster.Binaries | None) -> dict[int, Path]:
    """The tablespaces that recovery of the mounted `found`, with its WAL in `wal`, makes: where, by OID.

    Without those that lie in the data directory itself. Raises PreconditionError when that cannot be told.
    """
    told = _tablespace_records(wal, cluster.read_control(found), binaries)
    made = [match for line in told.splitlines() if (match := _CREATE.search(line)) is not None]
    return {int(match[1]): Path(match[2]) for match in made if match[2]}


def _tablespace_records(wal: Path, control: Control, binaries: cluster.Binaries | None) -> str:
    """What pg_waldump tells of them, from the redo point up to where recovery ends. Raises PreconditionError."""
    if binaries is None:
        raise PreconditionError(
            "PostgreSQL of its version is not found", "install it, or name its directory in PGCDP_PG_BINDIRS"
        )
    program = binaries.path("pg_waldump")
    words = ["--path=.", "--rmgr=Tablespace", "--start", format_lsn(control.redo_lsn)]
    environment = {**cluster.environment(), "LC_ALL": "C"}
    command = [str(program), *words, *_first_and_last(wal, control)]
    # As whose WAL it is: the program is one that he may have chosen. He may be unable to get to it by its path.
    status = wal.stat()
    owner = proc.User(f"with number {status.st_uid}", status.st_uid, status.st_gid, ())
    done = proc.run(command, user=owner, cwd=wal, check=False, env=environment)
    # It ends where recovery does: at what is no record, or with the last segment.
    if done.returncode and "error in WAL record at" not in done.stderr:
        raise PreconditionError(f"{program} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _first_and_last(wal: Path, control: Control) -> tuple[str, str]:
    """The segment in which recovery begins, and the last of those behind it without a hole.

    Where none is named, pg_waldump learns their size from the first file that it finds, and one that was made in
    advance is all zeros; where one is, it reads no other.
    """
    size = control.wal_segment_size
    names = (segment_name(control.timeline, lsn, size) for lsn in count(control.redo_lsn, size))
    first = next(names)
    return first, [first, *takewhile(lambda name: (wal / name).exists(), names)][-1]
