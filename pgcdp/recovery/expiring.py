"""Retention carried out: what a plan lets go of goes, durably, and in steps of which each may be the last.

A step makes something aside and publishes it by one rename (a base, a joined interval), or replaces one manifest (a
thinned interval). With that, and not before, something is let go of; nothing that counts is ever removed. So a kill
leaves a whole store, and the next run plans anew from what is there. What does not count is swept away at the end.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import NO_ROOM, FileLock, free_space, make_directory
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Span
from pgcdp.recovery.choosing import Choice, would_go
from pgcdp.recovery.joining import join
from pgcdp.recovery.sweeping import Quiet, Swept, clear_aside, sweep
from pgcdp.store.base import publish_base
from pgcdp.store.bundle import Bundle
from pgcdp.store.kept import kept_marks, verified_boundaries
from pgcdp.store.layout import Store
from pgcdp.store.let_go import AGENT, say_let_go
from pgcdp.store.mirroring import Mirror
from pgcdp.store.open_views import OpenView, open_views, seen_views
from pgcdp.store.reserve import Reserve
from pgcdp.store.retention import Plan, Policy, Step
from pgcdp.store.thinning import Stop, Stopped, never, thin

log = logging.getLogger(__name__)

STEPS = 64
"""After so many steps what was let go of is removed."""
AT_ONCE = 32
"""So many intervals are thinned to make room, then it is looked how much came back: before, it is an estimate."""
TOO_LARGE = 8
"""So many intervals for which there is no room, and no other is tried: a smaller one might find some."""
AGAIN_SECONDS = 6 * 3600.0
"""What could not be read is tried again after so long: a disk may have been mended, a cable put in."""


@dataclass(slots=True)
class Done:
    """What a run did: as `Plan`, the bytes that came back, and what it could not do, in words."""

    base: int | None = None
    joins: list[Span] = field(default_factory=list)
    thin: list[int] = field(default_factory=list)
    bytes: int = 0
    waiting: str = ""
    failed: list[str] = field(default_factory=list)

    def steps(self) -> tuple[int | None, int, int]:
        """Changes with each step."""
        return self.base, len(self.joins), len(self.thin)

    def tell(self) -> None:
        """Write into the log what was done, if anything was."""
        if self.base is not None or self.joins or self.thin:
            log.info(
                "retention: %s, %d joined, single writes of %d gone, %d bytes came back",
                "the base stays" if self.base is None else f"boundary {self.base} is the oldest",
                len(self.joins), len(self.thin), self.bytes,
            )  # fmt: skip


class Unreadable:
    """Steps for which something could not be read. They are passed over for some hours, by all runs that share this."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[Step, float] = {}

    def add(self, step: Step) -> None:
        """It failed just now."""
        self._since[step] = self._clock()

    def steps(self) -> frozenset[Step]:
        """What is not tried now."""
        self._since = {step: at for step, at in self._since.items() if self._clock() - at < AGAIN_SECONDS}
        return frozenset(self._since)


class _NotNow(Exception):
    """A step is left undone: what it would let go of is needed since the plan was made."""


class _NotMirrored(Exception):
    """The catalog did not forget an interval: it would tell of single writes that are gone."""


class AnotherRuns(PreconditionError):
    """Another run goes on."""


@contextmanager
def expiring(store: Store, *, wait: bool = False) -> Iterator[None]:
    """One run at a time. Raises AnotherRuns, unless it shall wait for that; PreconditionError when there is no block
    left for the lock of a store that never had one."""
    try:
        lock = FileLock(
            store.path / "expire.lock", f"another expire of set {store.set_name}", wait=math.inf if wait else 0
        )
    except PreconditionError as error:
        raise AnotherRuns(error.message, "the agent lets go by itself when the settings say so; try again") from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise _no_block_left(store, "expire.lock", error) from None
    with lock:
        yield


def _no_block_left(store: Store, name: str, error: OSError) -> PreconditionError:
    return PreconditionError(
        f"{store.path / name} cannot be made: {error.strerror}, and the store has no reserve",
        f"remove something else on that disk, or enlarge it: 1 MiB may be enough; then pgcdp expire {store.set_name}, "
        "or the agent by itself, goes on",
    )


def have_reserve(reserve: Reserve) -> None:
    """Have one where there is room for it, unless a run goes on; what keeps it from being made does not matter now."""
    with suppress(PgcdpError, OSError), expiring(reserve.store):
        reserve.make()


def _stays(step: Step, why: str) -> str:
    return f"interval {step[1].last} stays as it is: {why}"


class Run:
    """One run over a store, inside of `expiring`. `stop` is asked between steps and pieces of them.

    `unreadable`: what earlier runs could not read; it gets what this one finds. `by`: who lets go, for the history.
    `shown`: only what these plans say goes (None: whatever the policy says). `reserve`: what finds no room gets that of
    it; at the end it is there again, or for the first time.
    """

    def __init__(
        self, store: Store, policy: Policy, *, level: int = 1, stop: Stop = never, progress: Report = silent,
        free: Callable[[Store], int] = lambda store: free_space(store.path), unreadable: Unreadable | None = None,
        by: str = AGENT, shown: Sequence[Plan] | None = None, reserve: Reserve | None = None,
    ) -> None:  # fmt: skip
        self.store = store
        self.policy = policy
        self.level = level
        self.stop = stop
        self.progress = progress
        self.free = free
        self.by = by
        self.shown = shown
        self.reserve = reserve
        self.done = Done()
        self.unreadable = Unreadable() if unreadable is None else unreadable
        self._mirror = Mirror(store)
        self._quiet = Quiet(store, stop, lambda: progress(Progress("waiting for who reads the image")))
        self._swept = Swept(0, "")
        self._undone = set[Step]()
        self._points = frozenset[int]()  # pinned when the plan was made
        self._said: list[Plan] = []
        self._unsaid: list[Plan] = []
        self._no_room: list[str] = []  # what found none since something came back
        self._too_large = set[Step]()
        self._may_join = self._may_make = True
        self._reserve_used = False
        self._ended = False

    def run(self, now_ns: int | None = None) -> Done:
        """Do what the policy says, then make room if there is less than it says. Raises what planning raises."""
        with self._begun():
            now = time.time_ns() if now_ns is None else now_ns
            self._sweep()
            while not self.stop() and not self._ended:
                choice = self._choose(now)
                stages = [stage if self.shown is None else stage.within(self.shown) for stage in choice.stages]
                found = next((stage for stage in stages if stage), None)
                if found is None:
                    self._say_missing(choice)
                    break
                if not self._goes_on(found, choice):
                    self._say_missing(choice)
                    break
        return self.done

    def carry_out(self, found: Plan) -> Done:
        """Do what a plan says, whatever the policy."""
        with self._begun():
            self._unsaid.append(found)
            self._points = self._pinned(seen_views(self.store))
            self._carry_out(found)
            self._sweep()
        return self.done

    def _choose(self, now: int) -> Choice:
        choice = would_go(
            self.store, self.policy, now, self.free(self.store),
            may_make=self._may_make, may_join=self._may_join,
            avoid=self.unreadable.steps() | self._undone | self._too_large,
        )  # fmt: skip
        self._points = choice.pins.points if choice.pins is not None else frozenset()
        return choice

    def _goes_on(self, found: Plan, choice: Choice) -> bool:
        """Carry out a stage, or what of it can be done before it is looked again; whether that was of use."""
        makes_room = choice.makes_room
        if makes_room and self._swept.unknown:
            return False
        if not any(found.within([said]) == found for said in [*self._said, *self._unsaid]):
            self._unsaid.append(found)
        piece = Plan(found.base, found.joins[:1], found.thin[:AT_ONCE]) if makes_room else found
        before, back = self._state(), self.done.bytes
        self._carry_out(piece)
        self._sweep()
        if self._no_room and self.done.bytes > back:
            self._no_room.clear()
            self._too_large.clear()
            self._may_join = self._may_make = True
        if makes_room and self.done.bytes == back and self.done.waiting:
            return False  # to go on would only let go of more that an open view holds
        return self._state() != before

    def _state(self) -> object:
        """Changes as long as there is a point in going on."""
        given_up = len(self._undone | self.unreadable.steps() | self._too_large), self._may_join, self._may_make
        return self.done.steps(), self.done.bytes, given_up, self._reserve_used

    def _say_missing(self, choice: Choice) -> None:
        missing = self.policy.least_free - self.free(self.store)
        if not self.policy.least_free or missing <= 0:
            return
        if self.done.waiting:
            why = f"what was let go of comes back later: {self.done.waiting}"
        elif self.shown is not None and any(choice.stages):
            why = "pgcdp expire again shows what else would go"
        else:
            why = "nothing else may be let go of" + (f", behind {choice.kept_for}" if choice.kept_for else "")
        self.done.failed.append(f"{missing} bytes less than least_free are free, and {why}")

    @contextmanager
    def _begun(self) -> Iterator[None]:
        try:
            self._make_aside()
            clear_aside(self.store)
            yield
            if self.done.steps() != Done().steps():
                self._say()
            self.done.failed += self._no_room[:1]  # once: of the others it is the same
        finally:
            self._mirror.close()
            self._have_reserve()

    def _make_aside(self) -> None:
        try:
            make_directory(self.store.aside)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise PreconditionError(
                    f"{self.store.aside} cannot be made: {error.strerror}", "see whether the store's disk works"
                ) from None
            if not self._use_reserve():
                raise _no_block_left(self.store, self.store.aside.name, error) from None
            make_directory(self.store.aside)

    def _use_reserve(self) -> bool:
        """Have the room of the reserve; whether there was any."""
        if self.reserve is None or not self.reserve.release():
            return False
        self._reserve_used = True
        log.info("retention: the reserve of %s was given free", self.store.path)
        return True

    def _have_reserve(self) -> None:
        if self.reserve is None:
            return
        try:
            if self._reserve_used:
                self.reserve.put_back()
            else:
                self.reserve.make()
        except (OSError, PgcdpError) as error:
            log.warning("retention: %s cannot be made: %s", self.reserve.path, error)

    def _carry_out(self, found: Plan) -> None:
        if found.base is not None:
            span = next(each for each in self.store.spans() if each.last == found.base)
            self._step(("base", span), "moving the oldest boundary", self._move_base)
        steps: list[Step] = [("join", span) for span in found.joins]
        steps += [("thin", Span(number, number)) for number in found.thin]
        for at, step in enumerate(steps, 1):
            if step[0] == "join":
                self._step(step, "joining intervals", self._join, at - 1, len(steps))
            else:
                self._step(step, "letting go of single writes", self._thin, at - 1, len(steps))
            if at % STEPS == 0:
                self._sweep()  # what is made needs room, and this gives some

    def _step(self, step: Step, what: str, work: Callable[[Span], None], at: int = 0, count: int = 1) -> None:
        """One step; what is damaged, or finds no room, is left as it is and said."""
        if self.stop() or self._ended or not self._may(step):
            return
        self.progress(Progress(what, at, count, "intervals"))
        try:
            work(step[1])
        except Stopped:
            clear_aside(self.store)
        except _NotNow as why:
            clear_aside(self.store)
            self._undone.add(step)
            log.info("intervals up to %d stay: %s", step[1].last, why)
        except _NotMirrored as error:
            self._ended = True
            self._failed(step, str(error))
        except DamageError as damage:
            self.unreadable.add(step)
            self._failed(step, damage.message)
        except OSError as error:
            if error.errno == errno.EROFS:
                raise
            if error.errno in NO_ROOM:
                self._found_no_room(step)
            else:  # a sector that cannot be read must not keep all else from being let go of
                self.unreadable.add(step)
                self._failed(step, f"{error.filename or self.store.path}: {error.strerror}")

    def _found_no_room(self, step: Step) -> None:
        """What needs less is tried then: to thin intervals instead of joining them, smaller ones, at last the base."""
        back = self.done.bytes
        clear_aside(self.store)
        self._sweep()
        if self.done.bytes > back or self._use_reserve():
            return  # it is chosen again
        if step[0] == "base":
            self._ended = True
        elif step[0] == "join":
            self._may_join = False
        else:
            self._too_large.add(step)
            self._may_make = len(self._too_large) < TOO_LARGE
        self._no_room.append(_stays(step, f"{self.store.path} is full"))

    def _may(self, step: Step) -> bool:
        """Whether there was room for what is like it."""
        if step[0] == "base":
            return True
        return self._may_make and (self._may_join or step[0] == "thin") and step not in self._too_large

    def _failed(self, step: Step, why: str) -> None:
        clear_aside(self.store)
        self.done.failed.append(_stays(step, why))
        log.warning("%s", self.done.failed[-1])

    # --- the steps

    def _move_base(self, span: Span) -> None:
        bundle = Bundle.at(self.store, span)
        publish_base(self.store, span, lambda: self._commit(-1, bundle.interval.to_write))
        self.done.base = span.last

    def _join(self, span: Span) -> None:
        first = next(each for each in self.store.spans() if each.first == span.first)
        begin = Bundle.at(self.store, first).interval.from_write - 1
        end = Bundle.open(self.store, span.last).interval.to_write
        bundle = join(self.store, span, self.level, lambda: self._commit(begin, end), self.stop)
        self.done.joins.append(span)
        self._put(bundle)

    def _thin(self, span: Span) -> None:
        bundle = Bundle.at(self.store, span)
        interval = bundle.interval
        if not interval.restorable_by_write:  # the catalog told otherwise
            self._undone.add(("thin", span))
            self._put(bundle)
            return

        @contextmanager
        def commit() -> Iterator[None]:
            with self._commit(interval.from_write - 1, interval.to_write):
                try:  # first: what the catalog mirrors may be behind, never ahead
                    self._mirror.forget(span.last)
                except PgcdpError as error:
                    raise _NotMirrored(error.message) from None
                yield

        bundle = thin(self.store, span, self.level, commit, self.stop)
        self.done.thin.append(span.last)
        self._put(bundle)

    @contextmanager
    def _commit(self, begin: int, end: int) -> Iterator[None]:
        """Points between two writes go inside. A clone may have been opened there since the plan was made, or a mark
        kept: both hold the image while they look, so that they are either seen here or find that it is gone. Or a
        boundary there is the newest verified one by now.
        """
        self._say()
        with self._quiet():
            try:
                pinned = self._pinned(open_views(self.store))
                verified = self._verified_write()
            except PgcdpError as error:
                raise _NotNow(error.message) from None
            needed = [point for point in pinned - self._points | verified if begin < point < end]
            if needed:
                raise _NotNow(f"write {needed[0]} is needed since just now")
            yield

    def _verified_write(self) -> frozenset[int]:
        """Of the newest boundary that was verified; nothing when none is there."""
        for number in sorted(verified_boundaries(self.store), reverse=True):
            span = self.store.span_of(number)
            if span is not None and self.store.place(span).is_dir():
                return frozenset({Bundle.at(self.store, span).interval.to_write})
        return frozenset()

    def _pinned(self, views: Sequence[OpenView]) -> frozenset[int]:
        return frozenset({view.write for view in views} | {each.write for each in kept_marks(self.store)})

    def _say(self) -> None:
        """In the history, once for all that was decided; later where there is no room, which this is about to make."""
        while self._unsaid:
            try:
                name, time_ns, content = say_let_go(self.store, time.time_ns(), self.by, self._unsaid[0])
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                return
            self._said.append(self._unsaid.pop(0))
            self._mirrored(partial(self._mirror.put_history, name, "event", time_ns, content))

    def _put(self, bundle: Bundle) -> None:
        self._mirrored(lambda: self._mirror.put_interval(bundle))

    def _mirrored(self, work: Callable[[], None]) -> None:
        """What the catalog lacks then, is read from the manifests."""
        try:
            work()
        except PgcdpError as error:
            log.warning("%s", error.message)

    def _sweep(self) -> None:
        self.progress(Progress("removing what was let go of"))
        try:
            self._swept = sweep(self.store, self.stop)
        except OSError as error:  # not even a name
            if error.errno not in NO_ROOM or not self._use_reserve():
                raise
            self._swept = sweep(self.store, self.stop)
        self.done.bytes += self._swept.bytes
        self.done.waiting = self._swept.waiting
        self._mirrored(self._forget)

    def _forget(self) -> None:
        known = self._mirror.intervals().keys()  # first: the agent may publish one now
        for number in known - set(self.store.interval_numbers()):
            self._mirror.forget(number)
