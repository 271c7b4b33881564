"""Retention carried out: what a plan lets go of goes, durably, and in steps of which each may be the last.

A step makes something aside and publishes it by one rename (a base, a joined interval), or replaces one manifest (a
thinned interval). With that, and not before, something is let go of; nothing that counts is ever removed. So a kill
leaves a whole store, and the next run plans anew from what is there. What does not count is swept away at the end.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import FileLock, free_space, make_directory
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Span
from pgcdp.recovery.joining import join
from pgcdp.recovery.sweeping import Quiet, Stopped, clear_aside, sweep
from pgcdp.store.base import publish_base, read_base
from pgcdp.store.catalog import Catalog
from pgcdp.store.image import read_state
from pgcdp.store.kept import kept_marks, verified_boundaries
from pgcdp.store.layout import Store
from pgcdp.store.open_views import seen_views
from pgcdp.store.published import published
from pgcdp.store.retention import Holding, Pins, Plan, Policy, plan, relieve
from pgcdp.store.thinning import thin

log = logging.getLogger(__name__)

STEPS = 64
"""After so many steps what was let go of is removed."""


@dataclass(slots=True)
class Done:
    """What a run did: as `Plan`, the bytes that came back, and what it could not do, in words."""

    base: int | None = None
    joins: list[Span] = field(default_factory=list)
    thin: list[int] = field(default_factory=list)
    bytes: int = 0
    waiting: str = ""
    failed: list[str] = field(default_factory=list)


class _NotMirrored(PgcdpError):
    """The catalog did not forget an interval: it would tell of single writes that are gone."""


class AnotherRuns(PreconditionError):
    """Another run goes on."""


@contextmanager
def expiring(store: Store) -> Iterator[None]:
    """One run at a time. Raises AnotherRuns."""
    try:
        lock = FileLock(store.path / "expire.lock", f"another expire of set {store.set_name}")
    except PreconditionError as error:
        raise AnotherRuns(error.message, "the agent lets go by itself when the settings say so; try again") from None
    with lock:
        yield


def holding_of(store: Store) -> Holding | None:
    """What a store holds; None while its first image is not complete."""
    while True:
        base = read_base(store)
        known = published(store)
        if read_base(store) == base:
            break
    if base is None:
        return None
    indexed = frozenset(number for number, each in known.items() if each.indexed)
    return Holding(base, [each.interval for each in known.values()], indexed)


def pins_of(store: Store, holding: Holding) -> Pins:
    """What must stay now. Raises DamageError when what may say so is damaged."""
    points = {kept.write for kept in kept_marks(store)} | {view.write for view in seen_views(store)}
    there = {boundary.number for boundary in holding.boundaries()}
    return Pins(
        at=read_state(store).boundary,
        points=frozenset(points),
        verified=max(verified_boundaries(store) & there, default=None),
    )


def planned(store: Store, policy: Policy, now_ns: int, free: int | None = None) -> Plan:
    """What a run would begin with. `free`: bytes that are free in the store (None: look)."""
    holding = holding_of(store)
    if holding is None:
        return Plan()
    pins = pins_of(store, holding)
    found = plan(holding, policy, pins, now_ns)
    if found or not policy.least_free:
        return found
    return relieve(holding, pins, policy.least_free - (free_space(store.path) if free is None else free))


class Run:
    """One run over a store. `stop` is asked between steps; call it inside of `expiring`.

    `damaged`: what earlier runs could not read, and is not tried again; it gets what this one finds.
    """

    def __init__(
        self, store: Store, policy: Policy, *, level: int = 1,
        stop: Callable[[], bool] = lambda: False, progress: Report = silent,
        free: Callable[[Store], int] = lambda store: free_space(store.path), damaged: set[Span] | None = None,
    ) -> None:  # fmt: skip
        self.store = store
        self.policy = policy
        self.level = level
        self.stop = stop
        self.progress = progress
        self.free = free
        self.done = Done()
        self._catalog: Catalog | None = None
        self._commit = Quiet(store, stop, lambda: progress(Progress("waiting for who reads the image")))
        self._damaged = set[Span]() if damaged is None else damaged
        self._full = False

    def run(self, now_ns: int | None = None) -> Done:
        """Do what the policy says, then make room if there is less than it says. Raises what planning raises."""
        with self._begun():
            now = time.time_ns() if now_ns is None else now_ns
            self._sweep()
            holding = holding_of(self.store)
            if holding is not None:
                self._carry_out(plan(holding, self.policy, pins_of(self.store, holding), now))
                self._sweep()
            self._make_room()
        return self.done

    def carry_out(self, found: Plan) -> Done:
        """Do what a plan says, whatever the policy."""
        with self._begun():
            self._carry_out(found)
            self._sweep()
        return self.done

    @contextmanager
    def _begun(self) -> Iterator[None]:
        try:
            make_directory(self.store.aside)
        except OSError as error:
            raise PreconditionError(
                f"{self.store.aside} cannot be made: {error.strerror}",
                "give back some space by hand first",
            ) from None
        clear_aside(self.store)
        with suppress(DamageError):  # it mirrors the manifests; `rebuild` mends it
            self._catalog = Catalog.open(self.store)
        try:
            yield
        finally:
            if self._catalog is not None:
                self._catalog.close()

    def _make_room(self) -> None:
        """The oldest goes until enough is free, or nothing else may go."""
        may_thin = True
        while self.policy.least_free and not self.stop():
            missing = self.policy.least_free - self.free(self.store)
            holding = holding_of(self.store)
            if missing <= 0 or holding is None or self.done.waiting:
                return
            found = relieve(holding, pins_of(self.store, holding), missing, may_thin)
            if not found:
                self.done.failed.append(
                    f"{missing} bytes less than least_free are free, and nothing else may be let go of"
                )
                return
            before = self._steps()
            self._carry_out(found)
            self._sweep()
            if found.thin and self._steps() == before:  # no room, or damage
                may_thin = self._full = False
            elif self._steps() == before:
                return

    def _steps(self) -> tuple[int | None, int]:
        return self.done.base, len(self.done.thin)

    def _carry_out(self, found: Plan) -> None:
        if found.base is not None and not self.stop():
            self._step(Span(found.base, found.base), "moving the oldest boundary", self._move_base)
        steps = [(span, "joining intervals", self._join) for span in found.joins]
        steps += [(Span(number, number), "letting go of single writes", self._thin) for number in found.thin]
        for at, (span, what, work) in enumerate(steps, 1):
            self._step(span, what, work, at - 1, len(steps))
            if at % STEPS == 0:
                self._sweep()  # what is made needs room, and this gives some

    def _step(self, span: Span, what: str, work: Callable[[Span], None], at: int = 0, count: int = 1) -> None:
        """One step; what is damaged, or finds no room, is left as it is and said."""
        if self.stop() or self._full or span in self._damaged:
            return
        self.progress(Progress(what, at, count, "intervals"))
        try:
            work(span)
        except Stopped:
            clear_aside(self.store)
        except _NotMirrored as error:
            self._full = True
            self._failed(span, error.message)
        except DamageError as damage:
            self._damaged.add(span)
            self._failed(span, damage.message)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            back = self.done.bytes
            clear_aside(self.store)
            self._sweep()
            self._full = self.done.bytes == back
            if self._full:  # all else would find no room either
                self._failed(span, f"{self.store.path} is full")

    def _failed(self, span: Span, why: str) -> None:
        clear_aside(self.store)
        self.done.failed.append(f"interval {span.last} stays as it is: {why}")
        log.warning("%s", self.done.failed[-1])

    def _move_base(self, span: Span) -> None:
        found = next(each for each in self.store.spans() if each.last == span.last)
        publish_base(self.store, found, self._commit)
        self.done.base = span.last

    def _join(self, span: Span) -> None:
        bundle = join(self.store, span, self.level, self._commit)
        self._mirror(lambda catalog: catalog.put_interval(bundle))
        self.done.joins.append(span)

    def _thin(self, span: Span) -> None:
        @contextmanager
        def commit() -> Iterator[None]:
            with self._commit():  # the catalog forgets it first: what it mirrors may be behind, never ahead
                if self._catalog is not None:
                    try:
                        self._catalog.remove_interval(span.last)
                    except DamageError as error:
                        raise _NotMirrored(error.message) from None
                yield

        bundle = thin(self.store, span, self.level, commit)
        self._mirror(lambda catalog: catalog.put_interval(bundle))
        self.done.thin.append(span.last)

    def _mirror(self, work: Callable[[Catalog], None]) -> None:
        if self._catalog is not None:
            try:
                work(self._catalog)
            except PgcdpError as error:
                log.warning("%s", error.message)
                self._catalog = None

    def _sweep(self) -> None:
        self.progress(Progress("removing what was let go of"))
        swept = sweep(self.store, self.stop)
        self.done.bytes += swept.bytes
        self.done.waiting = swept.waiting
        self._mirror(self._forget)

    def _forget(self, catalog: Catalog) -> None:
        known = catalog.intervals().keys()  # first: the agent may publish one now
        for number in known - set(self.store.interval_numbers()):
            catalog.remove_interval(number)
