"""Write a recovery point out: to image files, to a mounted scratch place, to a startable data directory.

A directory gets its global/pg_control last, after all else is synced: a restore that was killed leaves a directory that
Postgres refuses, and that the next restore to the same place replaces.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pgcdp.capture import copying
from pgcdp.config import set_of_pgdata
from pgcdp.errors import UsageError
from pgcdp.fsio import sync_directory, write_atomic
from pgcdp.postgres import configuration_files
from pgcdp.postgres.cluster import Binaries
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery.links import lead_inside, own_places
from pgcdp.recovery.restored_spaces import Restored, planned, refuse_created, refuse_shared
from pgcdp.recovery.scratch import copied, elsewhere, write_images
from pgcdp.recovery.source import Source


def to_image(source: Source, point: RecoveryPoint, place: Path, progress: Report = silent) -> int:
    """Write the volumes to `place`: the file itself for a set of one volume, else a directory of NAME.img.

    It appears under its name only when it is whole and synced. Returns its bytes. Raises UsageError when it exists.
    """
    if place.exists():
        raise UsageError(f"{place} exists", "name a file that does not exist, or remove it first")
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent} is no directory", f"make it first: mkdir -p {place.parent}")
    partial = place.with_name(place.name + ".partial")
    remove(partial)
    single = len(source.store.in_use) == 1
    if not single:
        partial.mkdir(mode=0o700)
    files = [partial if single else partial / f"{volume.name}.img" for volume in source.store.in_use]
    try:
        written = write_images(source, point, files, progress)
        partial.rename(place)
        sync_directory(place.parent)
    except BaseException:
        remove(partial)
        raise
    return written


def to_directory(
    source: Source,
    point: RecoveryPoint,
    place: Path,
    progress: Report = silent,
    spaces: Mapping[str, Path] = MappingProxyType({}),
    binaries: Binaries | None = None,
) -> tuple[int, list[Restored], dict[str, str]]:
    """Make `place` a data directory that can be started. Returns the bytes of its files, where tablespaces are, and
    which configuration files come from production's outside of the data directory: {name: its path}.

    It must not exist, or be empty, or be what a killed restore left. A pg_wal that lay elsewhere is inside of it;
    tablespaces go where `spaces` says, by name or OID, the others to a directory beside it. `binaries` are Postgres's
    programs of its version, where there are any. Raises UsageError for a tablespace that is none, PreconditionError for
    what would use production's own files once it was started.
    """
    work, beside = place.parent / f".pgcdp-restore-{place.name}", place.with_name(f"{place.name}.tablespaces")
    _refuse_used(place, beside, work)
    refuse_shared(spaces, place, beside)
    with copied(source, point, work, progress) as found:
        production = elsewhere(source, point, found)
        links = own_places(found, production)
        refuse_created(
            found, links.get(found / "pg_wal", found / "pg_wal"), binaries, Path(source.store.extra["pgdata"])
        )
        restored = planned(links, found, source.settings(point), spaces, place, beside)
        status = found.stat()
        control = found / "global" / "pg_control"
        content, control_status = control.read_bytes(), control.stat()
        for name in ("global/pg_control", "postmaster.pid", "postmaster.opts"):
            (found / name).unlink(missing_ok=True)
        trees = {found: place, **{each.copy: each.place for each in restored if not each.copy.is_relative_to(found)}}
        wal = links.pop(found / "pg_wal", None)
        if wal is not None:
            (found / "pg_wal").unlink()
            (found / "pg_wal").mkdir()
            trees[wal] = place / "pg_wal"
        lead_inside(trees, production)
        for each in restored:
            (found / "pg_tblspc" / str(each.oid)).unlink()
            (found / "pg_tblspc" / str(each.oid)).symlink_to(each.place)
        remove(beside)
        size = _copy(trees, beside, (status.st_uid, status.st_gid), progress)
        try:
            configuration = _put_configuration(place, source.settings(point), (status.st_uid, status.st_gid))
            _put_control(place, content, control_status)
        except BaseException:
            for made in (*trees.values(), beside):
                remove(made)
            raise
    remove(work)
    sync_directory(place.parent)
    return size + len(content), restored, configuration


def _copy(trees: Mapping[Path, Path], beside: Path, owner: tuple[int, int], progress: Report) -> int:
    """Copy each tree to its place, which is made anew unless it lies in one before; nothing is left when that fails."""
    for copy in trees:
        lost = copy / "lost+found"
        if lost.is_dir():
            lost.rmdir()
    total, done = sum(copying.measure(copy).content for copy in trees), 0
    made: list[Path] = []
    try:
        for copy, place in trees.items():
            if not any(place.is_relative_to(each) for each in made):
                remove(place)
                if place.parent == beside:
                    beside.mkdir(mode=0o711, exist_ok=True)
                    beside.chmod(0o711)  # whatever the umask says
                place.mkdir(mode=0o700)
                os.chown(place, *owner)
                made.append(place)
            copying.copy_tree(copy, place, partial(_tell, progress, done, total))
            done += copying.measure(copy).content
            sync_directory(place.parent)
    except BaseException:
        for place in (*made, beside):
            remove(place)
        raise
    return total


def _tell(progress: Report, before: int, total: int, done: int) -> None:
    progress(Progress("copying files", before + done, total))


def _put_configuration(place: Path, settings: Mapping[str, Any] | None, owner: tuple[int, int]) -> dict[str, str]:
    """Configuration files that lay outside of the data directory: those in it were not read."""
    made = {}
    for name, kept in (settings or {}).get("files", {}).items():
        if name not in configuration_files.NAMES.values():
            continue
        if os.path.lexists(place / name):  # Postgres did not read that one
            (place / name).rename(place / f"{name}.not-used")
        text = configuration_files.text_of(kept)
        write_atomic(place / name, configuration_files.for_a_copy(text), owner=owner)
        made[name] = str(kept["path"])
    return made


def _put_control(place: Path, content: bytes, status: os.stat_result) -> None:
    """pg_control under its name is what makes the directory startable: all else is durable before it."""
    control = place / "global" / "pg_control"
    fd = os.open(control.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
        os.fchown(fd, status.st_uid, status.st_gid)
        os.fsync(fd)
    finally:
        os.close(fd)
    control.with_suffix(".new").rename(control)
    sync_directory(control.parent)
    sync_directory(place)
    sync_directory(place.parent)


def _refuse_used(place: Path, beside: Path, work: Path) -> None:
    """The work directory beside it tells that a restore to this place was begun and not finished."""
    if not place.parent.is_dir():
        raise UsageError(f"{place.parent} is no directory", f"make it first: mkdir -p {place.parent}")
    unfinished = work.is_dir() and not (place / "global" / "pg_control").exists()
    if beside.exists() and not unfinished:
        raise UsageError(f"{beside} exists: tablespaces are restored to it", "remove it, or name another directory")
    if not place.exists():
        return
    if not place.is_dir():
        raise UsageError(f"{place} is not a directory", "name a directory that does not exist")
    if any(place.iterdir()) and not unfinished:
        owner = set_of_pgdata(place)
        if owner is not None:
            raise UsageError(
                f"{place} is the data directory of set {owner} itself",
                "--in-place instead of --to-directory brings that back; or name a directory that does not exist",
            )
        raise UsageError(f"{place} is not empty", "name a directory that does not exist, or remove it first")


def remove(place: Path) -> None:
    """A file or a tree; harmless when there is none."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
