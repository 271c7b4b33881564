"""Room that a store keeps for retention: a file of allocated blocks, given free when the disk is full (FORMAT.md 3).

What lets go of old points needs some room first: what an interval keeps without its single writes is copied before they
go. On a disk that is full to the last block not even a directory can be made. So the file `reserve` takes that room
while there is plenty, is removed when there is none, and is made anew behind it. It holds nothing, and may go any time.

It is as large as what thinning the largest interval takes, within LEAST_BYTES and MOST_BYTES. Whoever makes or removes
it lets nobody else let go of something meanwhile (`recovery.expiring.expiring`), and never does it in the store of
another machine: whoever has that may need it just then.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pgcdp import twice
from pgcdp.errors import PgcdpError
from pgcdp.fsio import NO_ROOM, free_space, naming, sync_directory
from pgcdp.machine import Place
from pgcdp.records import Interval
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from pgcdp.store.lease import refuse_other
from pgcdp.store.published import published
from pgcdp.store.retention import thinned_bytes

FILE = "reserve"
LEAST_BYTES = 8 << 20
MOST_BYTES = 256 << 20
STEP_BYTES = 8 << 20
"""It is a multiple of that, so that it does not grow a little with each interval."""
EDGE_BYTES = 1 << 20
"""It is not smaller."""
SPARE_BYTES = 64 << 20
"""So much more must be free before it is made: it is no reason for the disk to be full."""


def is_short(place: Path) -> bool:
    """Whether a store has neither a reserve nor the room for one: whoever gave it free may have been killed."""
    there = twice.STORE.exists(place) and not (place / FILE).exists()
    return there and free_space(place) <= SPARE_BYTES


class Reserve:
    """The reserve of a store, for who may write to it from `here`.

    `release` and `make` raise OSError, and PreconditionError when the store belongs to another machine or root.
    """

    def __init__(self, store: Store, here: Place) -> None:
        self.store = store
        self.path = store.path / FILE
        self._here = here

    def bytes(self) -> int:
        """How much room it has: 0 when it is missing. Where it was copied as a hole it has none."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return 0
        return min(status.st_size, status.st_blocks * 512)

    def release(self) -> bool:
        """Give its room free; whether there was any."""
        refuse_other(self.store, self._here)
        if not self.bytes():
            return False
        self.path.unlink()
        sync_directory(self.store.path)  # with that, filesystems give out the blocks again
        return True

    def make(self) -> bool:
        """Have it, as large as it should be, unless the disk is nearly full; whether it is now."""
        refuse_other(self.store, self._here)
        free = free_space(self.store.path)
        if free <= SPARE_BYTES:  # then how large it should be need not be known
            return False
        have, wanted = self.bytes(), self._wanted()
        if have >= wanted:
            return True
        if free - (wanted - have) <= SPARE_BYTES:
            return False
        self._allocate(wanted)
        return True

    def put_back(self) -> bool:
        """Have it again after it was released, as large as what is left allows; whether it is now.

        Nothing else shall get that room first: without it, retention could not work at a full disk again.
        """
        refuse_other(self.store, self._here)
        size = self._wanted()
        while size >= EDGE_BYTES:  # how much there is, is not said: some is for root alone, some for nobody
            try:
                self._allocate(size)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                size -= max(EDGE_BYTES, size // 8)
            else:
                return True
        return False

    def _allocate(self, size: int) -> None:
        fresh = not self.path.exists()
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with naming(fd):
                os.posix_fallocate(fd, 0, size)
                os.fsync(fd)
        except BaseException:
            if fresh:  # what it got is needed more by others
                with suppress(OSError):
                    self.path.unlink()
            raise
        finally:
            os.close(fd)
        sync_directory(self.store.path)

    def _wanted(self) -> int:
        """For the newest interval, or as large as it is; where it is missing, for the largest of all."""
        have = self.bytes()
        return max(have, size_for(self._newest() if have else self._published()))

    def _newest(self) -> list[Interval]:
        number = self.store.newest_number()
        with suppress(PgcdpError):
            return [Bundle.open(self.store, number).interval] if number else []
        return []

    def _published(self) -> list[Interval]:
        with suppress(PgcdpError):
            return [each.interval for each in published(self.store).values()]
        return self._newest()


def size_for(intervals: list[Interval]) -> int:
    """Bytes that thinning any of them takes, with what is written beside it."""
    needs = [each.stored["writes"] - thinned_bytes(each) for each in intervals if each.restorable_by_write]
    size = max(needs, default=0) + LEAST_BYTES // 2
    return min(max(-(-size // STEP_BYTES) * STEP_BYTES, LEAST_BYTES), MOST_BYTES)
