"""Who may read store and journal: they hold all that the cluster holds, so nobody but root."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pgcdp.errors import PreconditionError
from pgcdp.records import Remark

_OTHERS = 0o077


def close_to_others(directory: Path) -> None:
    """Make a directory that was there before one of root's alone. Raises PreconditionError when that cannot be done."""
    try:
        os.chown(directory, os.geteuid(), os.getegid())
        directory.chmod(0o700)
    except OSError as error:
        raise PreconditionError(
            f"{directory} cannot be closed to others: {error.strerror}",
            "choose a filesystem that knows owners and modes",
        ) from None


def private(what: str, place: Path) -> Iterator[Remark]:
    """Whether only root gets into a directory, and whether somebody else could put another in its place."""
    name = f"access to the {what}"
    found = os.stat(place)
    mends = f"chown -R root: {shlex.quote(os.fspath(place))} && chmod -R u=rwX,go= {shlex.quote(os.fspath(place))}"
    open_to = _open_to(found)
    above = _replaceable(place)
    if open_to:
        yield Remark(
            name, "failure", f"{place} {open_to}: it holds all data of the cluster, whatever roles and rules say", mends
        )  # fmt: skip
    if above is not None:
        yield Remark(
            name, "warning", f"{above} can be written by others, who could put another {what} in its place",
            f"chown root: {shlex.quote(os.fspath(above))} && chmod go-w {shlex.quote(os.fspath(above))}",
        )  # fmt: skip
    loose = list(_loose(place))
    if loose:
        yield Remark(
            name, "warning",
            f"{len(loose)} files in {place} have other owners or modes, such as {loose[0].name}: closed only by the "
            "directory above them",
            mends,
        )  # fmt: skip
    if not (open_to or loose or above is not None):
        yield Remark(name, "ok", "root alone")


def _open_to(found: os.stat_result) -> str | None:
    if found.st_uid != 0:
        return f"belongs to user id {found.st_uid}"
    if found.st_mode & _OTHERS:
        return f"has mode {stat.S_IMODE(found.st_mode):04o}"
    return None


def _replaceable(place: Path) -> Path | None:
    """A directory above in which others may rename: it is theirs, or writable and not sticky."""
    for above in Path(os.path.realpath(place)).parents:
        found = above.stat()
        writable = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
        if found.st_uid != 0 or writable:
            return above
    return None


def _loose(place: Path) -> Iterator[Path]:
    """Of what lies in a directory, and in those in it, what others could read by its own mode."""
    for directory in (place, *(each for each in place.iterdir() if each.is_dir() and not each.is_symlink())):
        with suppress(FileNotFoundError):
            for each in sorted(directory.iterdir()):
                with suppress(FileNotFoundError):  # renamed just now
                    found = each.lstat()
                    if not stat.S_ISLNK(found.st_mode) and _open_to(found):
                        yield each
