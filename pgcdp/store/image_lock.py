"""Readers of the image against its movement: a restore that copies the image holds it where it is.

One flock on `image/lock`: shared for those who read, exclusive for the agent while it moves the image.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pgcdp.store.layout import Store


@contextmanager
def image_held(store: Store, *, exclusive: bool = False) -> Iterator[None]:
    """Hold the image: nobody moves it meanwhile, or (`exclusive`) nobody reads it. Waits for the others."""
    fd = os.open(store.image / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)
