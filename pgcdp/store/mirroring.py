"""The catalog for those who go on for long: opened anew when it failed, or when a rebuild put another in its place.

The catalog may be behind the manifests, never ahead of them: it must not tell of single writes that are gone. So an
interval is forgotten before they go, with readers kept out of the image; and what a manifest says is mirrored while
the image is held, so that it is not replaced between being read and being written down.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pgcdp.errors import DamageError, PgcdpError, TargetError
from pgcdp.records import Boundary
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog, Mirrored, catalog_file, said_of, seen_of
from pgcdp.store.history import history_names, read_history
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import Store

T = TypeVar("T")

DAY_EVENT = "-0000-event.json"
"""How the name of an event ends that may be one that grows (`store.let_go`)."""


class Mirror:
    """The catalog of a store. With `make` one is made where there is none; else there is nothing to mirror then.

    Whatever it raises, the next call begins with a new connection.
    """

    def __init__(self, store: Store, *, make: bool = False) -> None:
        self.store = store
        self.make = make
        self._catalog: Catalog | None = None
        self._file: tuple[int, int] | None = None

    def catalog(self) -> Catalog | None:
        """The one that is there now. Raises DamageError when it cannot be read."""
        file = self._identity()
        if self._catalog is not None and file != self._file:
            self.close()
        if self._catalog is None and (self.make or file is not None):
            self._catalog = Catalog.open(self.store)
            self._file = self._identity() if file is None else file
        return self._catalog

    def forget(self, number: int) -> None:
        """Make sure that an interval is not told of, durably enough that no reader sees it. Raises DamageError."""
        self._do(lambda catalog: catalog.remove_interval(number))

    def put_interval(self, bundle: Bundle) -> None:
        """As `Catalog.put_interval`."""
        self._do(lambda catalog: catalog.put_interval(bundle))

    def put_baseline(self, boundary: Boundary) -> None:
        """As `Catalog.put_baseline`."""
        self._do(lambda catalog: catalog.put_baseline(boundary))

    def put_history(self, name: str, kind: str, time_ns: int, content: dict[str, object]) -> None:
        """As `Catalog.put_history`."""
        self._do(lambda catalog: catalog.put_history(name, kind, time_ns, content))

    def intervals(self) -> dict[int, Mirrored]:
        """As `Catalog.intervals`."""
        found: dict[int, Mirrored] | None = self._do(Catalog.intervals)
        return found or {}

    def catch_up(self) -> None:
        """Mirror what is not: what a kill kept from it, or all of it where the store is seen for the first time.

        What is damaged is passed over: whoever needs it reads the store itself.
        """
        if self.store.baseline is not None:
            self.put_baseline(self.store.baseline)
        known = self.intervals()
        for span in self.store.spans():
            told = known.get(span.last)
            if told is None or told.interval.span != span or told.seen != seen_of(self.store.place(span)):
                with image_held(self.store), suppress(TargetError, DamageError):  # joined with others just now
                    bundle = Bundle.at(self.store, span)
                    self.put_interval(bundle)
        self._catch_up_history()

    def _catch_up_history(self) -> None:
        """An entry never changes, except that of what the agent lets go of on one day, while that day lasts."""
        there = history_names(self.store)
        mirrored: set[str] = self._do(Catalog.history_names) or set()
        growing = [name for name in there if name.endswith(DAY_EVENT)][-1:]
        for name in (each for each in there if each not in mirrored or each in growing):
            try:
                kind, time_ns, content = read_history(self.store, name)
            except (DamageError, FileNotFoundError):
                continue
            self.put_history(name, kind, time_ns, content)

    def close(self) -> None:
        """Close it; it is opened again when it is asked for."""
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def _do(self, work: Callable[[Catalog], T]) -> T | None:
        try:
            catalog = self.catalog()
            return None if catalog is None else work(catalog)
        except PgcdpError:
            self.close()
            raise

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = os.stat(catalog_file(self.store))
        except (FileNotFoundError, PermissionError):  # what this user may not see, he has none of
            return None
        return status.st_dev, status.st_ino


def what_differs(store: Store) -> list[str]:
    """What the catalog says otherwise than the store's files, in words; nothing when there is no catalog.

    What it lacks, and what is not as it was mirrored, does not count: nobody is told of it. Raises DamageError when the
    catalog cannot be read.
    """
    if not os.path.exists(catalog_file(store)):
        return []
    catalog = Catalog.open(store)
    try:
        catalog.check()
        found = []
        mirrored = catalog.intervals()
        for span in store.spans():
            told = mirrored.get(span.last)
            if told is None or told.interval.span != span or told.seen != seen_of(store.place(span)):
                continue
            with suppress(DamageError, TargetError):
                bundle = Bundle.at(store, span)
                if (told.interval, told.said) != (bundle.interval, said_of(bundle)):
                    found.append(f"{catalog.path} tells interval {span.last} otherwise than its manifest")
        for name, row in catalog.history_told().items():
            with suppress(DamageError, FileNotFoundError):
                kind, time_ns, content = read_history(store, name)
                if row != (kind, time_ns, content):
                    found.append(f"{catalog.path} tells {name} otherwise than the history")
        return found
    finally:
        catalog.close()
