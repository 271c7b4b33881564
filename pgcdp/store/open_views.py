"""The views that are open on a store: who must hear of it before the image moves (truth 6).

Each has a file in `image/views/`, which its engine holds locked as long as it lives: the lock is on a descriptor that
the engine inherits, so it is let go however the engine ends, and nobody else can hold it. A file is made while the
image is held (`image_lock.image_held`), from before the map is made until the engine serves; it is looked for, and
cleared away when its engine has ended, by whoever keeps all of these out. So a view is either found here, or is made
of what the image's state says then.

What the view shows now, only its engine knows: its status names the file of its map, and that names the files of
intervals that it reads. Retention removes none of these files; it looks here as a move does, with readers kept out
meanwhile (`recovery.sweeping`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp.errors import DamageError
from pgcdp.fsio import is_locked, write_all
from pgcdp.store.layout import Store

MOMENT_SECONDS = 1.0
"""How long after its lock a file may lack its content, for who only looks."""


@dataclass(frozen=True, slots=True)
class OpenView:
    """A view whose engine lives. `file` is locked by it, `control` is its socket, `write` its recovery point."""

    file: Path
    control: Path
    write: int

    def is_open(self) -> bool:
        """Whether its engine still lives."""
        return is_locked(self.file)


@dataclass(frozen=True, slots=True)
class Registered:
    """`descriptor` must be inherited by the engine (-1: none). Who ends the view may `forget` it then."""

    descriptor: int = -1
    file: Path | None = None

    def forget(self) -> None:
        """The engine has ended."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


@contextmanager
def registered(store: Store, control: Path, write: int) -> Iterator[Registered]:
    """Make a view known. Call it while the image is held, and start the engine inside.

    From the end of the context on, the view is known as long as the engine lives. Of a store that cannot be written
    to nobody moves the image, and nothing is registered. A view of a store alone is not registered at all: its engine
    inherits the lock and holds the image.
    """
    directory = _directory(store)
    file = directory / secrets.token_hex(8)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        yield Registered()
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        write_all(fd, json.dumps({"control": os.fspath(control), "write": write}).encode(), 0)
        yield Registered(fd, file)
    finally:
        os.close(fd)


def seen_views(store: Store) -> list[OpenView]:
    """The same for those who only look: nothing is cleared away, and one that is being opened may be missing."""
    found = []
    for file in sorted(_directory(store).glob("*")):
        with suppress(FileNotFoundError):
            if is_locked(file):
                found.append(_read_soon(file))
    return found


def _read_soon(file: Path) -> OpenView:
    """As `_read` of a file that may be being made: it is locked before it is written."""
    until = time.monotonic() + MOMENT_SECONDS
    while True:
        try:
            return _read(file)
        except DamageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def open_views(store: Store) -> list[OpenView]:
    """The views whose engine lives; files of others go. Call it with readers kept out of the image.

    Raises DamageError for a file that a living engine holds and that does not tell whose it is.
    """
    found = []
    for file in sorted(_directory(store).glob("*")):
        if is_locked(file):
            with suppress(FileNotFoundError):  # it has ended just now
                found.append(_read(file))
        else:
            file.unlink(missing_ok=True)
    return found


def _read(file: Path) -> OpenView:
    raw = file.read_bytes()
    try:
        content = json.loads(raw)
        return OpenView(file.resolve(), Path(content["control"]), int(content["write"]))
    except (ValueError, KeyError, TypeError):
        raise DamageError(
            f"{file} does not tell which view it is of (offset 0)",
            f"the image waits until its engine has ended: fuser -v {file} names it",
        ) from None


def _directory(store: Store) -> Path:
    return store.image / "views"
