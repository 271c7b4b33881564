"""The published intervals as their manifests say, without reading ten thousand files: the catalog mirrors them.

What is in the catalog is not looked at here; whoever opens the `Bundle` compares it with the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pgcdp.errors import DamageError
from pgcdp.records import Interval
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import FILE_NAME, Catalog, said_of
from pgcdp.store.layout import Store


@dataclass(frozen=True, slots=True)
class Published:
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
        return self.store.interval(self.interval.number)


def published(store: Store, but: Collection[int] = ()) -> dict[int, Published]:
    """By number, in order, without those in `but`. Raises what `Bundle.open` does for what the catalog lacks."""
    numbers = [number for number in store.interval_numbers() if number not in but]
    mirrored = _mirrored(store) if len(numbers) > 1 else {}
    found = {}
    for number in numbers:
        if number in mirrored:
            interval, said = mirrored[number]
            found[number] = Published(interval, store, said)
        else:
            bundle = Bundle.open(store, number)
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
