"""The published intervals as their manifests say, without reading ten thousand files: the catalog mirrors them.

What is in the catalog is not looked at here; whoever opens the `Bundle` compares it with the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from pgcdp.errors import DamageError, TargetError
from pgcdp.records import Interval, Span
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import FILE_NAME, Catalog, said_of
from pgcdp.store.layout import Store


class Published(NamedTuple):
    """A published interval. `said`: as `catalog.said_of`."""

    interval: Interval
    store: Store
    said: str | None

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
            return _published(store, spans, known)
        except TargetError:
            if store.spans() == spans:  # else one was joined or let go of just now
                raise


def _published(store: Store, spans: list[Span], known: Mapping[int, Published]) -> dict[int, Published]:
    fresh = [span for span in spans if span.last not in known or known[span.last].interval.span != span]
    mirrored = _mirrored(store) if len(fresh) > 1 else {}
    found: dict[int, Published] = {}
    for span in spans:
        number = span.last
        if number in known and known[number].interval.span == span:
            found[number] = known[number]
        elif number in mirrored and mirrored[number][0].span == span:
            found[number] = Published(mirrored[number][0], store, mirrored[number][1])
        else:
            bundle = Bundle.at(store, span)
            found[number] = Published(bundle.interval, store, said_of(bundle))
    return found


def _mirrored(store: Store) -> dict[int, tuple[Interval, str | None]]:
    """What the catalog has; nothing when there is none or it cannot be read: the manifests say the same."""
    if not os.path.exists(store.path / FILE_NAME):
        return {}
    with suppress(DamageError):
        catalog = Catalog.open(store)
        try:
            return catalog.intervals()
        finally:
            catalog.close()
    return {}
