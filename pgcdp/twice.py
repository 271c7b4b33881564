"""The two small files that a store cannot do without, each written twice (FORMAT.md 3): `store.json`, which says whose
store it is, and the image's `state.json`, which says which boundary the image is at.

Each copy is complete, with its own checksum, sealed like any other file of its store. They are written one after the
other, each by rename and synced, the one of the old name first: killed anywhere, at least one is whole. Of two whole
ones the newer counts, by what they say, never by times or names. So a write counts from the first rename on, and that
is right: what it speaks of was synced before, and nobody goes on before the second one is durable, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgcdp import fsio
from pgcdp.errors import DamageError

MARK = "twice"
"""A key that both copies have: where it is, the other one must be there. A store of before has one file, without it."""

Content = dict[str, Any]
Order = Callable[[Content], tuple[int, ...]]


@dataclass(frozen=True)
class Twice:
    """A file of a directory that is written twice. `order`: what the content of a newer one has more of."""

    name: str
    copy: str
    order: Order

    @property
    def names(self) -> tuple[str, str]:
        """Of both, in the order in which they are written."""
        return self.name, self.copy

    def exists(self, directory: Path) -> bool:
        """Whether one of both is there, whole or not; one that cannot be looked at is."""
        return any(_is_there(directory / name) for name in self.names)

    def read(self, directory: Path) -> Content:
        """The newer one of those that are whole.

        Raises FileNotFoundError or NotADirectoryError when there is none, DamageError or OSError when none is whole.
        """
        whole, wrong = self._both(directory)
        if whole:
            return max(whole.values(), key=self.order)  # of equal ones the first
        missing = [error for error in wrong.values() if isinstance(error, _MISSING)]
        there = [error for error in wrong.values() if not isinstance(error, _MISSING)]
        if len(there) <= 1:
            raise (there or missing)[0]
        if all(isinstance(error, OSError) for error in there):
            raise there[0]
        hint = next(error.hint for error in there if isinstance(error, DamageError))
        raise DamageError(" and ".join(_said(file, error) for file, error in wrong.items()), hint)

    def write(self, directory: Path, content: Mapping[str, object]) -> None:
        """Write both, durably, one after the other."""
        for name in self.names:
            fsio.write_json(directory / name, {**content, MARK: True})

    def damaged(self, directory: Path) -> Iterator[tuple[Path, str, Path | None]]:
        """Which of both is not as it was written: the file, what is wrong with it, and the other one if that is whole.

        One that is whole and older is not damaged: a kill leaves that. Nor is the second of a store of before missing.
        """
        whole, wrong = self._both(directory)
        if not whole and all(isinstance(error, _MISSING) for error in wrong.values()):
            return
        for file, error in wrong.items():
            other = next(iter(whole), None)
            if file.name == self.copy and isinstance(error, _MISSING) and not (other and whole[other].get(MARK)):
                continue
            yield file, _said(file, error), other

    def mend(self, directory: Path) -> list[Path]:
        """Make both say what the newer whole one says, durably; returns those that were damaged.

        Nothing when none is whole. For who may write them.
        """
        damaged = [file for file, _, _ in self.damaged(directory)]
        whole, wrong = self._both(directory)
        if not whole:
            return []
        content = max(whole.values(), key=self.order)
        if content.get(MARK) and not wrong and all(each == content for each in whole.values()):
            return []
        self.write(directory, content)
        return damaged

    def remove(self, directory: Path) -> None:
        """Remove both, durably."""
        for name in self.names:
            (directory / name).unlink(missing_ok=True)
        fsio.sync_directory(directory)

    def _both(self, directory: Path) -> tuple[dict[Path, Content], dict[Path, DamageError | OSError]]:
        """What the whole ones hold, and what is wrong with the others."""
        whole, wrong = dict[Path, Content](), dict[Path, DamageError | OSError]()
        for file in (directory / name for name in self.names):
            try:
                whole[file] = fsio.read_json(file)
            except (DamageError, OSError) as error:
                wrong[file] = error
        return whole, wrong


_MISSING = (FileNotFoundError, NotADirectoryError)


def _said(file: Path, error: DamageError | OSError) -> str:
    if isinstance(error, DamageError):
        return error.message
    if isinstance(error, _MISSING):
        return f"{file} is missing (offset 0)"
    return f"{file} cannot be read at offset 0: {error.strerror}"


def _is_there(file: Path) -> bool:
    try:
        os.lstat(file)
    except _MISSING:
        return False
    except OSError:  # its disk fails, say: that is no empty place
        return True
    return True


def _revision(content: Content) -> tuple[int, ...]:
    """Of store.json: it says so itself. A pgcdp of before kept the number that it found, and wrote the first one."""
    return (int(content.get("revision", 0)),)


def _where(content: Content) -> tuple[int, ...]:
    """Of state.json: the first copy of the volumes goes on, and behind that boundaries only rise (FORMAT.md 3.4)."""
    if content.get("state") == "baseline":
        return 0, int(content.get("journal_write", 0)), sum(content.get("copied", {}).values())
    return 1, int(content.get("boundary", 0)), int(content.get("to") is not None)


STORE = Twice("store.json", "store-copy.json", _revision)
"""At the top of a store."""
STATE = Twice("state.json", "state-copy.json", _where)
"""In `image/`."""


def mend(store: Path) -> list[Path]:
    """Mend both files of a store that nobody else writes to; returns what was damaged."""
    return [*STATE.mend(store / "image"), *STORE.mend(store)]


def next_revision(store: Path) -> int:
    """That of the next store.json of a store."""
    try:
        return _revision(STORE.read(store))[0] + 1
    except (DamageError, OSError):
        return 1
