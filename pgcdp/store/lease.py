"""Who may write to a store: one set, on one machine, below one state root (FORMAT.md 3).

The agent's flock keeps out who shares this machine's kernel. On shared storage it may not reach another machine. So the
store says whose it is, and the agent that has it renews that every few seconds. Nobody takes it from another by
himself, however old it looks: clocks of two machines differ, and a machine that was stopped may go on. `take_over` is
asked for by a person, and watches first whether it is still renewed. Who has lost it so finds that within a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from pgcdp import fsio
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import FileLock
from pgcdp.machine import Place
from pgcdp.progress import Progress, Report, silent
from pgcdp.store.layout import Store
from pgcdp.units import format_time

FILE = "owner.json"
RENEW_SECONDS = 10.0
WATCH_SECONDS = 25.0
"""How long it is watched for a renewal: two of them fall into it."""
LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has a store. `renewals` rises; `renewed_ns` is by the owner's clock; `released`: let go of in order."""

    place: Place
    renewals: int
    renewed_ns: int
    released: bool

    def __str__(self) -> str:
        what = "let go of it" if self.released else "renewed that last"
        return f"{self.place}, which {what} on {format_time(self.renewed_ns)}"


def owner_of(store: Store) -> Owner | None:
    """Who has a store; None when nobody said so yet, or it cannot be read."""
    try:
        content: dict[str, Any] = fsio.read_json(store.path / FILE)
        place = Place.of(content["place"])
        return Owner(place, int(content["renewals"]), int(content["renewed_ns"]), bool(content["released"]))
    except (FileNotFoundError, DamageError, KeyError, TypeError, ValueError):
        return None


def refuse_other(store: Store, here: Place) -> None:
    """Raises PreconditionError when another machine or root has the store."""
    owner = owner_of(store)
    if owner is not None and not owner.place.is_same(here):
        raise _refused(store, owner)


def _refused(store: Store, owner: Owner) -> PreconditionError:
    return PreconditionError(
        f"the store {store.path} of set {store.set_name} belongs to {owner}",
        f"if that machine is gone for good: pgcdp up {store.set_name} --take-over",
    )


def _no() -> bool:
    return False


def take_over(store: Store, here: Place, progress: Report = silent, look: Callable[[], bool] = _no) -> None:
    """Have the store belong to this machine and root, durably.

    Raises PreconditionError when it belongs to another that still renews it: that is watched for WATCH_SECONDS. `look`
    watches something else meanwhile: it raises what it sees, and tells whether it must look longer.
    """
    owner = owner_of(store)
    if owner is not None and not owner.place.is_same(here) and not owner.released:
        _refuse_renewed(store, owner, progress, look)
    while look():
        time.sleep(0.2)
    _write(store, here, 0, released=True)


def _refuse_renewed(store: Store, owner: Owner, progress: Report, look: Callable[[], bool] = _no) -> None:
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        look()
        now = owner_of(store)
        if now is not None and now.renewals != owner.renewals:
            raise PreconditionError(
                f"the store {store.path} of set {store.set_name} is in use by {now}",
                f"stop it there first: pgcdp down {store.set_name}",
            )
        progress(Progress(f"watching whether {owner.place.host} still writes to the store"))
        time.sleep(0.2)


class Lease:
    """A store that belongs to this machine and root, locked by this process.

    A thread renews it until `release()`, whatever else the process does or waits for; what it says of itself outlives
    the process.
    """

    def __init__(self, store: Store, lock: FileLock, here: Place, renewals: int) -> None:
        self.store = store
        self.here = here
        self.lost = False
        """It was taken over: nothing may be written any more."""
        self._lock = lock
        self._renewals = self._tried = renewals
        self._renewed = time.monotonic()
        self._trouble: PgcdpError | OSError | None = None
        self._ended = Event()
        self._thread = Thread(target=self._renewing, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, store: Store, here: Place) -> Lease:
        """Take it, when it is nobody's or was ours.

        Where the machine was started since, it may be a copy of the one that has it: it is watched first. Raises
        PreconditionError when it is another's, or another agent of this machine has it locked.
        """
        refuse_other(store, here)
        lock = store.lock()
        try:
            owner = owner_of(store)
            if owner is not None and owner.place.boot != here.boot and not owner.released:
                _refuse_renewed(store, owner, silent)
            renewals = 1 if owner is None else owner.renewals + 1
            _write(store, here, renewals)
        except BaseException:
            lock.release()
            raise
        return cls(store, lock, here, renewals)

    def keep(self) -> None:
        """Raises what keeps it from being renewed; PreconditionError when it was taken over."""
        if self._trouble is not None:
            raise self._trouble.with_traceback(None)

    def _renewing(self) -> None:
        while not self.lost and not self._ended.wait(LOOK_SECONDS):
            try:
                self._look()
                self._trouble = None
            except (PgcdpError, OSError) as trouble:
                self._trouble = trouble

    def _look(self) -> None:
        """Renew it when it is time."""
        owner = owner_of(self.store)
        if owner is not None and not self._is_ours(owner):
            self.lost = True
            raise PreconditionError(
                f"the store {self.store.path} was taken over by {owner}",
                f"two machines must not capture into it: pgcdp down {self.store.set_name} on one of them",
            )
        now = time.monotonic()
        if now - self._renewed >= RENEW_SECONDS:
            self._tried = self._renewals + 1
            _write(self.store, self.here, self._tried)
            self._renewals, self._renewed = self._tried, now

    def _is_ours(self, owner: Owner) -> bool:
        """A renewal that failed may have come there."""
        return owner.place.is_same(self.here) and owner.renewals in (self._renewals, self._tried)

    def release(self) -> None:
        """Let go of it in order: who comes next need not watch. Harmless when done twice, or when it was lost."""
        self._ended.set()
        self._thread.join()
        try:
            owner = owner_of(self.store)
            if owner is not None and self._is_ours(owner):
                with suppress(OSError):  # the store's disk may be what fails
                    _write(self.store, self.here, self._renewals, released=True)
        finally:
            self._lock.release()


def _write(store: Store, here: Place, renewals: int, *, released: bool = False) -> None:
    content = {"set": store.set_name, "set_id": store.set_id.hex(), "place": here.as_json(), "renewals": renewals}
    fsio.write_json(store.path / FILE, {**content, "renewed_ns": time.time_ns(), "released": released})
