"""Removing what retention let go of, as soon as nobody reads it.

What counts is said by manifests and names (`Store.spans`), so what does not count may lie there for any time. It goes
when neither a restore, which holds the image, nor an open view can read it: a view's map names the files that it reads.
It goes by a rename out of the way first, so that nobody ever finds a part of a directory, and readers are kept out no
longer than the renames take.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp.capture.control import EngineClient, EngineGone
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.fsio import NO_ROOM, make_directory, sync_directory
from pgcdp.recovery.mapfile import FramesSource, decode
from pgcdp.recovery.merged import stale
from pgcdp.store.bundle import Bundle
from pgcdp.store.image_lock import image_to_move
from pgcdp.store.layout import Store, numbers_in, spans_in
from pgcdp.store.open_views import OpenView, open_views
from pgcdp.store.published import published
from pgcdp.store.thinning import GONE, Stop, Stopped, leftovers, never

MOMENT_SECONDS = 2.0
"""How long a view may take to tell which map it shows."""
AGAIN_SECONDS = 0.2
AT_ONCE = 200
"""So many removals, then readers are let in for a moment."""

Named = frozenset[tuple[int, int]]
"""Files, as device and inode: the same file may be named by several paths."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What was removed, and for what the rest waits: "" when there is none.

    `unknown`: what comes back is not known yet, since a reader holds the image or a view does not tell what it reads.
    Else what waits is what open views read.
    """

    bytes: int
    waiting: str
    unknown: bool = False


class Quiet:
    """Readers kept out of the image; waits for those that are in it. Raises Stopped when `stop` says so meanwhile.

    Whoever restores holds the image, and looks at what is stored again and again: what counts must not change then.
    `say` hears when it has to wait.
    """

    def __init__(self, store: Store, stop: Stop, say: Callable[[], None] = lambda: None) -> None:
        self.store, self.stop, self.say = store, stop, say

    @contextmanager
    def __call__(self) -> Iterator[None]:
        while True:
            with image_to_move(self.store) as let_readers_in:
                if let_readers_in is not None:
                    if self.stop():  # asked with readers kept out: whoever looked before found what counts then
                        raise Stopped
                    yield
                    return
            if self.stop():
                raise Stopped
            self.say()
            time.sleep(AGAIN_SECONDS)


def clear_aside(store: Store) -> None:
    """What a killed run was making or removing. Call it with no other run going on."""
    for path in list(store.aside.glob("*")) if store.aside.exists() else ():
        _remove(path)


def sweep(store: Store, stop: Stop = never) -> Swept:
    """Remove all that counts no more and that nobody reads. One process at a time. Raises OSError."""
    make_directory(store.aside)
    freed, waiting = 0, ""
    left = list(_let_go(store))
    while left and not stop():
        some, left = left[:AT_ONCE], left[AT_ONCE:]
        with image_to_move(store) as let_readers_in:
            if let_readers_in is None:
                return Swept(freed, "a reader holds the image", unknown=True)
            try:
                named = named_by_views(store)
            except PgcdpError as error:
                return Swept(freed, error.message, unknown=True)
            moved = set[Path]()
            for at, path in enumerate(some):
                if _is_named(path, named):
                    waiting = "an open view reads some of it"
                else:
                    size = size_of(path)
                    try:
                        os.rename(path, store.aside / f"gone-{path.parent.name}-{path.name}")
                    except FileNotFoundError:  # merged increments also go by who merges
                        continue
                    except OSError as error:
                        if error.errno not in NO_ROOM or not moved:
                            raise
                        left = some[at:] + left  # there is room for its name when those before are gone
                        break
                    freed += size
                    moved.add(path.parent)
        for parent in moved:  # first: else a power cut could bring back the name of what is half removed
            sync_directory(parent)
        clear_aside(store)
    return Swept(freed, waiting)


def waiting_bytes(store: Store) -> int:
    """Bytes of what counts no more and is still there."""
    return sum(size_of(path) for path in _let_go(store))


def _let_go(store: Store) -> Iterator[Path]:
    """Directories and files that do not count, the oldest first."""
    counts = {store.place(span) for span in store.spans()}
    base = store.base_number()
    with suppress(FileNotFoundError):
        yield from (store.bases / f"{n:010d}" for n in numbers_in(store.bases) if n < base)
    plain = [store.interval(number) for number in numbers_in(store.path / "intervals")]
    joined = [store.joined / span.file_name for span in sorted(spans_in(store.joined))]
    yield from (path for path in [*joined, *plain] if path not in counts)
    yield from (store.merged / span.file_name for span in stale(store, spans_in(store.merged)))
    for each in published(store).values():
        gone = ("forward",) if each.interval.restorable_by_write else GONE
        if any((each.path / name).exists() for name in gone):
            yield from leftovers(Bundle.at(store, each.interval.span))


def named_by_views(store: Store) -> Named:
    """The files that open views read, or will when somebody reads them. Call it with readers kept out of the image.

    Raises PgcdpError when one does not tell.
    """
    found: set[tuple[int, int]] = set()
    for view in open_views(store):
        try:
            found |= _named_by(view)
        except EngineGone:
            if view.is_open():
                raise
    return frozenset(found)


def _named_by(view: OpenView) -> set[tuple[int, int]]:
    client = EngineClient(view.control, timeout=MOMENT_SECONDS)
    file = Path(client.request("status")["map"])
    try:
        shown = decode(file.read_bytes(), file)
    except FileNotFoundError:  # another map was given to it just now
        raise PreconditionError(f"the view of write {view.write} was given another map") from None
    found = set()
    for source in shown.sources:
        if isinstance(source, FramesSource):
            with suppress(FileNotFoundError):
                found.add(_identity(source.path))
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_named(path: Path, named: Named) -> bool:
    if not named:
        return False
    return any(_identity(each) in named for each in (path.iterdir() if path.is_dir() else [path]))


def size_of(path: Path) -> int:
    """Bytes that a file or a directory of files takes on disk."""
    total = 0
    with suppress(FileNotFoundError):
        for each in path.iterdir() if path.is_dir() else [path]:
            total += each.lstat().st_blocks * 512
    return total


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
