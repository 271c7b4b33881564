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

from pgcdp.errors import PgcdpError, TargetError
from pgcdp.records import Boundary, Interval
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import FILE_NAME, Catalog
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import Store

T = TypeVar("T")


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

    def intervals(self) -> dict[int, tuple[Interval, str | None]]:
        """As `Catalog.intervals`."""
        found: dict[int, tuple[Interval, str | None]] | None = self._do(Catalog.intervals)
        return found or {}

    def catch_up(self) -> None:
        """Mirror what a kill or a failure kept from being mirrored."""
        if self.store.baseline is not None:
            self.put_baseline(self.store.baseline)
        known = self.intervals()
        for span in self.store.spans():
            told = known.get(span.last)
            thinned = (self.store.place(span) / "forward").exists()  # not yet, perhaps: then the manifest says so
            if told is None or told[0].span != span or told[0].restorable_by_write == thinned:
                with image_held(self.store), suppress(TargetError):  # joined with others just now
                    self.put_interval(Bundle.at(self.store, span))

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
            status = os.stat(self.store.path / FILE_NAME)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino
