"""Readers of the image against its movement: a restore that copies the image holds it where it is.

One flock on `image/lock`, which is made with the image: shared for those who read, exclusive for the agent from before
it tells the open views of a move until the image's state says "moving". From then on readers know which blocks not to
read, so they need not wait for the move's end; the next move waits for theirs. A view holds the image only while it is
being opened (`open_views`), but that of a store alone, where nothing is written, as long as it lives.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from pgcdp.store.layout import Store


@contextmanager
def image_held(store: Store) -> Iterator[int]:
    """Hold the image where it is, together with others who read it; one that is moving gets where it is going.

    Waits while a move begins. Gives the locked descriptor: whoever inherits it holds the image, too. -1 where there is
    nothing to lock: nothing is written to a store by those who read it, and one without this lock is a copy, or has no
    image that could move.
    """
    with _locked(store, fcntl.LOCK_SH) as descriptor:
        assert descriptor is not None
        yield descriptor


@contextmanager
def image_to_move(store: Store, *, wait: bool = False) -> Iterator[Callable[[], None] | None]:
    """Keep readers out while a move begins; None when one is there now (never with `wait`).

    Gives what lets them in: call it when the image's state says that it is moving. The lock is then one of theirs.
    """
    with _locked(store, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)) as descriptor:
        yield None if descriptor is None else partial(fcntl.flock, descriptor, fcntl.LOCK_SH)


@contextmanager
def _locked(store: Store, kind: int) -> Iterator[int | None]:
    """The locked descriptor; None when somebody else has the lock."""
    if kind == fcntl.LOCK_SH:
        try:
            fd = os.open(store.image / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield -1
            return
    else:
        fd = os.open(store.image / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, kind)
        except BlockingIOError:
            yield None
        else:
            yield fd
    finally:
        os.close(fd)


def make_lock(store: Store) -> None:
    """Make the lock of an image that can move: from then on whoever reads it can hold it."""
    os.close(os.open(store.image / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
