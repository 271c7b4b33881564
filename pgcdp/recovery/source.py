"""The recovery points of a store and of the journal behind it: which there are, and which one a target means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from pgcdp.capture.tracked import unrecorded_gap
from pgcdp.errors import DamageError, TargetError, UnseenError
from pgcdp.records import Boundary, Gap, Interval, RecoveryPoint, Rewind, Target
from pgcdp.recovery.branches import Stretch, beyond, branch_at, current_branch, refuse_inside
from pgcdp.recovery.gaps import before_open, newest_before, refuse_in_gap, refuse_time_in_gap, with_unrecorded
from pgcdp.recovery.left import hint_of, refuse_lost, refuse_lost_target, write_named
from pgcdp.recovery.target import Listing, refuse_let_go, resolve, window
from pgcdp.recovery.writes import Writes, as_mirrored
from pgcdp.store.base import missing_before
from pgcdp.store.bundle import Bundle
from pgcdp.store.gaps import GapFinder, may_have_gaps
from pgcdp.store.gaps import kept as kept_gaps
from pgcdp.store.image import read_state
from pgcdp.store.layout import TIMELINES, Store
from pgcdp.store.published import Published
from pgcdp.store.rewinds import Said, pair, said_in
from pgcdp.store.rewinds import kept as kept_rewinds
from pgcdp.units import format_lsn

if TYPE_CHECKING:
    from pgcdp.recovery.history import Transactions

R = TypeVar("R", Rewind, Gap)


class Source(Writes):
    """Everything that a recovery point can be made from: the store, with the set's journal where there is one."""

    _transactions: tuple[object, Transactions] | None = None  # with what was read of the tail; and of when

    def look(self) -> bool:
        """As for writes; what was read of transactions does not count any more then."""
        changed = super().look()
        if changed:
            self._transactions = None
        return changed

    def _needed_as_mirrored(self, point: RecoveryPoint) -> bool:
        """Whether the catalog's word is true of all that a point needs: from its interval to the image."""
        writes = point.write, point.blank_write or point.write, read_state(self.store).write
        return all(
            as_mirrored(each)
            for each in self.listed().values()
            if each.interval.to_write >= min(writes) and each.interval.from_write <= max(writes) + 1
        )

    def listing(self) -> Listing:
        """What can be restored now. Raises DamageError when the writes behind the last boundary cannot be read."""
        published = self.published()
        newest = self.again(lambda: self._newest(published.newest_write))

        def times(number: int | None) -> NDArray[np.int64]:
            return published.times(number) if number is not None else self._tail_times(published.newest_write, newest)

        return replace(published, newest_write=newest, times=times, quiet_until_ns=self.now_ns)

    def published(self) -> Listing:
        """What can be restored without looking behind the last boundary."""
        base, intervals = self._chain()

        def times(number: int | None) -> NDArray[np.int64]:
            if number is None:
                return np.empty(0, dtype=np.int64)
            return np.asarray(Bundle.open(self.store, number).index()["wall_ns"], dtype=np.int64)

        newest = intervals[-1].to_write if intervals else base.write
        return Listing(base, intervals, newest, times, missing=partial(missing_before, self.store))

    def resolve(self, target: Target) -> RecoveryPoint:
        """The recovery point of a target; TargetError when there is none, also inside a rewind in place or a gap.

        While the journal cannot grow and changes are tracked, the newest one lies in front of that gap, and says so.
        Nor is there one where retention let go of single writes. Damage behind the last boundary is raised only to
        those who want to go there.
        """
        if self._trusting:
            try:
                point = self._resolve(target)
                if self._needed_as_mirrored(point):
                    return point
                self.look()
            except Exception:  # whatever comes of what a catalog says that is of another store
                if self._trusting and not self.look():
                    raise
        return self._resolve(target)

    def _resolve(self, target: Target) -> RecoveryPoint:
        try:
            if target.kind == "time":
                refuse_time_in_gap(target.value, self.gaps())
            refuse_lost_target(self, target)
            point = self.place(target)
        except DamageError as damage:
            write = write_named(self, target)
            hint = damage.hint if write is None else hint_of(self, write, damage.message)
            raise DamageError(damage.message, hint) from None
        stored = self.intervals()
        within = [rewind for interval in stored for rewind in interval.rewinds]
        gaps = self._stored_gaps()
        open_end = any(gap.end == point.write for gap in gaps)  # another may begin behind the last boundary
        newest = target.kind == "newest" and not target.exclusive
        if not stored or point.write > stored[-1].to_write or open_end or newest:
            within, gaps = self.rewinds(), self.gaps()
        if newest and (before := newest_before(gaps)) is not None:
            write, note = before
            point = point if point.write == write else self.place(Target("write", write))
            point = replace(point, note=note)
        refuse_inside(point.write, within)
        refuse_in_gap(point.write, gaps)
        self.refuse_let_go(point)
        refuse_lost(self, point)
        return point

    def refuse_let_go(self, point: RecoveryPoint) -> None:
        """Raises TargetError for a point that needs single writes of which retention let go."""
        refuse_let_go(point, self.published())

    def _chain(self) -> tuple[Boundary, list[Interval]]:
        """The oldest boundary and what follows it, of one moment."""
        while True:
            base, intervals = self.base(), self.intervals()
            if self.base() == base:
                return base, intervals

    def rewinds(self) -> list[Rewind]:
        """All rewinds in place up to the newest write, in order; the last one may not have ended."""
        return self.again(self._rewinds)

    def _rewinds(self) -> list[Rewind]:
        intervals = self.intervals()
        stored = [
            rewind
            for each in self.listed().values()
            for rewind in self._told_of(each, each.interval.rewinds, kept_rewinds)
        ]
        if not stored and not (self.store.path / TIMELINES).is_dir():  # made before the first one begins
            return []
        said: list[Said] = []
        for records, data_of in self._tail(intervals):
            said += said_in(records, data_of)
        return stored + pair(said)

    def _told_of(self, found: Published, own: Sequence[R], kept: Callable[[Store], Sequence[R]]) -> Sequence[R]:
        """Rewinds or gaps of a published interval, also of one that is lost. `own`: those that its manifest has."""
        if not found.damage:
            return own
        with suppress(DamageError):
            return [
                each for each in kept(self.store) if found.interval.from_write <= each.begin <= found.interval.to_write
            ]
        return ()

    def gaps(self) -> list[Gap]:
        """All gaps up to the newest write, in order; the last one may not have ended."""
        return self.again(self._gaps)

    def _gaps(self) -> list[Gap]:
        intervals, finder = self.intervals(), GapFinder()
        stored = self._stored_gaps()
        unrecorded = None if self.journal is None else unrecorded_gap(self.journal)
        if not stored and unrecorded is None and not may_have_gaps(self.store):
            return []
        for records, data_of in self._tail(intervals):
            finder.take(records, data_of)
        found = stored + finder.found
        return with_unrecorded(found, unrecorded)

    def _stored_gaps(self) -> list[Gap]:
        return [gap for each in self.listed().values() for gap in self._told_of(each, each.interval.gaps, kept_gaps)]

    def place(self, target: Target) -> RecoveryPoint:
        """As `resolve`; a write inside a rewind in place is given, too, and one that is not kept by itself any more."""
        if target.kind == "newest" and not target.exclusive:
            return self._ends()[1]

        def attempt() -> RecoveryPoint:
            return resolve(target, self._with_history(target, self.listing(), True))

        try:
            return self.again(attempt)
        except UnseenError:  # what another branch has under that number is not what is meant
            raise
        except TargetError:
            if not target.branch and target.kind in ("xid", "lsn"):
                self._refuse_other_branches(target)
            raise
        except DamageError as damage:
            published = self.published()
            try:
                point = resolve(target, self._with_history(target, published, False))
            except TargetError:
                raise damage from None
            if target.kind == "time" and point.write == published.newest_write:
                raise
            return point

    def transactions(self, upto: int | None = None, branch: int = 0) -> Transactions:
        """The transactions up to a write (None: the newest one); call what reads them `again`.

        Those of the current branch, or of that of timeline `branch`. Raises TargetError when there is none.
        """
        from pgcdp.recovery.history import Transactions

        journal = self.journal.directory if self.journal is not None else None
        upto = self.durable_write if upto is None else upto
        key = (upto, self._stored())
        if self._transactions is None or self._transactions[0] != key:
            self._transactions = key, Transactions(self.store, dict(self.listed()), journal, upto, self._rewinds)
        found = self._transactions[1]
        return found.on(self.branch(branch)) if branch else found

    def _refuse_other_branches(self, target: Target) -> None:
        """Raises TargetError when what is not on the current branch is on others, which can be chosen."""
        found = []
        for branch in self.branches():
            with suppress(TargetError):
                self.place(replace(target, branch=branch))
                found.append(branch)
        if found:
            what = f"transaction {target.value}" if target.kind == "xid" else f"LSN {format_lsn(target.value)}"
            named = ", ".join(map(str, found))
            raise TargetError(
                f"{what} is not on the current branch; it is on timeline {named}, which a rewind has left",
                f"choose it with --branch {found[-1]}",
            )

    def branches(self) -> list[int]:
        """Timelines of boundaries, in the order in which they came up; each names the branch that it lies on."""
        return list(dict.fromkeys(each.timeline for each in self._boundaries()))

    def _boundaries(self) -> list[Boundary]:
        """Those whose timeline is known: of a lost interval it is not."""
        return [self.base(), *(each.interval.boundary for each in self.listed().values() if not each.damage)]

    def branch(self, timeline: int) -> list[Stretch]:
        """The whole branch of a timeline. Raises TargetError when there is none."""
        rewinds = self.rewinds()
        there = [each.write for each in self._boundaries() if each.timeline == timeline]
        if not there:
            known = ", ".join(map(str, self.branches()))
            raise TargetError(f"there is no branch with timeline {timeline}", f"--branch takes {known}")
        left = [rewind.begin - 1 for rewind in rewinds if rewind.begin > there[-1]]
        return branch_at(left[0], None, rewinds) if left else current_branch(rewinds)

    def branch_of(self, point: RecoveryPoint) -> int:
        """The timeline of the newest branch that a point lies on, 0 for the current one. TargetError for none."""
        rewinds = self.rewinds()
        here = branch_at(point.write, point.lsn, rewinds)
        if not beyond(here, current_branch(rewinds)):
            return 0
        for timeline in reversed(self.branches()):
            if not beyond(here, self.branch(timeline)):
                return timeline
        raise TargetError(
            f"write {point.write} lies on a branch that a rewind left before its first boundary",
            "its transactions cannot be chosen, its writes can: leave --commit out",
        )

    def _with_history(self, target: Target, listing: Listing, tail: bool) -> Listing:
        if target.kind not in ("xid", "lsn", "time", "name"):
            return listing
        transactions = self.transactions(listing.newest_write, target.branch)
        if target.kind == "name":
            transactions = transactions.everywhere()
        history = transactions.history()
        if not tail:
            history = replace(history, numbers=[number for number in history.numbers if number is not None])
        return replace(listing, history=history)

    def window(self) -> tuple[RecoveryPoint, RecoveryPoint]:
        """The oldest and the newest recovery point; while a gap lasts, the newest one lies in front of it."""
        first, last = self._ends()
        before = before_open(self.gaps())
        return first, last if before is None or before >= last.write else self.place(Target("write", before))

    def _ends(self) -> tuple[RecoveryPoint, RecoveryPoint]:
        """The oldest point and the newest write, reading no more than the time of that needs."""
        listing = self.listing()
        stored = listing.intervals[-1].to_write if listing.intervals else listing.base.write
        first, last = window(replace(listing, newest_write=stored))
        if listing.newest_write > stored:
            wall_ns = int(self.record(listing.newest_write)["wall_ns"])
            last = RecoveryPoint(listing.newest_write, None, wall_ns)
        return first, last
