"""The published intervals as their manifests say, without reading ten thousand files: the catalog mirrors them.

The catalog tells of a manifest as long as that is the file which was mirrored; of all others, they are read. No other
file is looked at here; whoever opens the `Bundle` compares it with the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from pgcdp.errors import PgcdpError, TargetError
from pgcdp.records import Interval, Span
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog, Mirrored, catalog_file, said_of, seen_of
from pgcdp.store.layout import Store


class Published(NamedTuple):
    """A published interval. `said`: as `catalog.said_of`. `damage`: why it cannot be read, "" for one that can.

    `unlooked`: `catalog.seen_of` its manifest as the catalog has it, where nobody looked at that; else None.
    Of one that cannot, `interval` is what its neighbours tell: its writes, and about when it was. It may stand for
    several that follow each other.
    """

    interval: Interval
    store: Store
    said: str | None
    damage: str = ""
    unlooked: str | None = None

    @property
    def indexed(self) -> bool:
        """Whether its transactions are known."""
        return self.said is not None

    @property
    def transactions(self) -> dict[str, Any] | None:
        """As `Bundle.transactions`. Parsed when it is asked for: of ten thousand intervals few are."""
        return None if self.said is None else cast("dict[str, Any]", json.loads(self.said))

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.store.place(self.interval.span)


_NOTHING: Mapping[int, Published] = MappingProxyType({})


def published(store: Store, known: Mapping[int, Published] = _NOTHING) -> dict[int, Published]:
    """By number, in order; those in `known` that are still there are taken from it.

    Raises what `Bundle.open` does for what the catalog lacks.
    """
    while True:
        spans = store.spans()
        try:
            return read_intervals(store, spans, known)
        except TargetError:
            if store.spans() == spans:  # else one was joined or let go of just now
                raise


def read_intervals(
    store: Store, spans: list[Span], known: Mapping[int, Published], *, look: bool = True
) -> dict[int, Published]:
    """Those of `spans`, each from `known`, the catalog or its manifest. Raises what `Bundle.at` does.

    Without `look` the catalog's word is taken for all that it has.
    """
    fresh = [span for span in spans if span.last not in known or known[span.last].interval.span != span]
    told = mirrored(store, look=look) if len(fresh) > 1 else {}
    found: dict[int, Published] = {}
    for span in spans:
        number = span.last
        if number in known and known[number].interval.span == span:
            found[number] = known[number]
        elif number in told and told[number].interval.span == span:
            interval, said, seen = told[number]
            found[number] = Published(interval, store, said, unlooked=None if look else seen)
        else:
            bundle = Bundle.at(store, span)
            found[number] = Published(bundle.interval, store, said_of(bundle))
    return found


def mirrored(store: Store, *, look: bool = True) -> dict[int, Mirrored]:
    """What the catalog has of manifests that are still the same; nothing when there is none or it cannot be read.

    Without `look` it may have been of others.
    """
    if not os.path.exists(catalog_file(store)):
        return {}
    with suppress(PgcdpError):
        catalog = Catalog.open(store)
        try:
            told = catalog.intervals()
        finally:
            catalog.close()
        if not look:
            return {number: each for number, each in told.items() if each.seen is not None}
        single = f"{store.path}/intervals/"  # there can be ten thousand, and making a Path costs more than the look
        return {
            number: each
            for number, each in told.items()
            if each.seen
            == seen_of(f"{single}{number:010d}" if each.interval.covers == 1 else store.place(each.interval.span))
        }
    return {}
