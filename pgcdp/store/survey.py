"""The published intervals of a store that may be damaged in part: what can be read, and what is lost between it.

A point needs its own interval, those from there to the image, and the image. So what lies behind a damaged interval
does not need it, and is listed and restored as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType

from pgcdp.errors import DamageError, PreconditionError, TargetError
from pgcdp.records import Boundary, Interval, Span
from pgcdp.store.base import missing_before, read_base
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import said_of
from pgcdp.store.image import read_state
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import read_open_index
from pgcdp.store.published import Published, mirrored, read_intervals


def survey(
    store: Store, known: Mapping[int, Published] = MappingProxyType({}), *, look: bool = True
) -> dict[int, Published]:
    """As `published`, with what is damaged or missing in its place: the others can be restored all the same.

    What cannot be placed, because nothing whole lies behind it, is left out, with all behind it. Without `look` a
    manifest that is damaged or another one by now is not noticed, if the catalog has it. Raises DamageError when the
    oldest boundary cannot be read.
    """
    names: tuple[tuple[str, ...], ...] | None = None
    while True:
        found, damages = _readable(store, store.spans(), known, look)
        base = read_base(store)
        whole = found if base is None else _placed(store, base, found, damages)
        if not damages and len(whole) == len(found):
            return whole
        before, names = names, store.names()  # only now: a store that is whole has no need of it
        if before == names:  # else what seems to lack may have been joined or let go of just now: looked at once more
            return whole


def _readable(
    store: Store, spans: list[Span], known: Mapping[int, Published], look: bool
) -> tuple[dict[int, Published], dict[int, str]]:
    """Those that can be read, and of the others why not; both by number."""
    with suppress(DamageError, TargetError):  # nearly always
        return read_intervals(store, spans, known, look=look), {}
    found: dict[int, Published] = {}
    damages: dict[int, str] = {}
    for number, told in mirrored(store).items():
        if told.interval.span in spans:
            found[number] = Published(told.interval, store, told.said)
    for span in spans:
        if span.last in found:
            continue
        try:
            bundle = Bundle.at(store, span)
            found[span.last] = Published(bundle.interval, store, said_of(bundle))
        except (DamageError, TargetError) as error:
            damages[span.last] = error.message
    return {span.last: found[span.last] for span in spans if span.last in found}, damages


def _placed(
    store: Store, base: Boundary, found: Mapping[int, Published], damages: Mapping[int, str]
) -> dict[int, Published]:
    """What can be read, and between it what cannot."""
    whole: dict[int, Published] = {}
    before = base
    time_ns = base.time_ns
    for number, each in found.items():
        interval = each.interval
        if interval.first <= before.number:
            continue
        if interval.first > before.number + 1:
            write = interval.from_write - 1
            lost = _lost(store, before, time_ns, interval.first - 1, write, interval.from_time_ns, damages)
            if lost is None:
                return whole
            whole[lost.interval.number] = lost
        elif interval.from_write != before.write + 1:
            message = f"{each.path / 'manifest.json'} begins with write {interval.from_write} (offset 0)"
            raise DamageError(f"{message}, boundary {before.number} before it is at write {before.write}")
        whole[number] = each
        before, time_ns = interval.boundary, interval.to_time_ns
    newest = max(damages, default=0)
    if newest > before.number:
        write = _end_of(store, newest)
        lost = _lost(store, before, time_ns, newest, write, time_ns, damages) if write else None
        if lost is not None:
            whole[newest] = lost
    return whole


def _lost(
    store: Store, before: Boundary, from_ns: int, last: int, write: int, to_ns: int, damages: Mapping[int, str]
) -> Published | None:
    """What stands for the intervals from boundary `before` up to `last`, at `write`; None: they do not fit there."""
    first = before.number + 1
    if write < before.write + (last - before.number):
        return None
    told = [damages[number] for number in range(first, last + 1) if number in damages]
    gone = next((number for number in range(first, last + 1) if number not in damages), None)
    if gone is not None:
        missing = missing_before(store, before.number, last + 1) if gone == first else store.interval(gone)
        told.append(f"{missing} is missing (offset 0)")
    boundary = Boundary(last, write, to_ns, 0, 0, before.timeline, 0, "lost")
    interval = Interval(
        last, before.write + 1, write, from_ns, to_ns, boundary, write - before.write, 0, 0,
        dict.fromkeys(("writes", "backward", "forward", "index", "transactions"), 0),
        covers=last - before.number, restorable_by_write=False,
    )  # fmt: skip
    return Published(interval, store, None, "; ".join(told))


def _end_of(store: Store, number: int) -> int:
    """The last write of an interval behind which no other is published, as what is beside it tells; 0: nothing does."""
    with suppress(DamageError, PreconditionError):
        state = read_state(store)
        if (state.state, state.boundary) == ("at", number):
            return state.write
    with suppress(DamageError, FileNotFoundError):
        entries = read_open_index(store, number + 1)
        if len(entries):
            return int(entries["number"][0]) - 1
    return 0
