"""SIGNATURES FIRST."""

from __future__ import annotations
from pathlib import Path
from typing import Literal
from pgcdp.records import Boundary, Interval
from pgcdp.store.layout import Store

HistoryKind = Literal["verification", "restore", "event"]


class Catalog:
    """STORE/catalog.db: cache of manifests and history."""

    @classmethod
    def open(cls, store: Store) -> Catalog: ...
    def put_baseline(self, boundary: Boundary) -> None: ...
    def baseline(self) -> Boundary | None: ...
    def put_interval(self, interval: Interval) -> None: ...
    def intervals(self) -> list[Interval]: ...
    def remember(self, kind: HistoryKind, time_ns: int, content: dict[str, object]) -> None:
        """History file first (atomic, synced), then the row."""

    def history(self, kind: HistoryKind, limit: int = 100) -> list[dict[str, object]]:
        """Newest first."""

    def last_verification(self, interval: int) -> dict[str, object] | None:
        """content needs "interval" and "ok" keys."""

    def close(self) -> None: ...


# rebuild.py: rebuild(store) -> Catalog
# scrub.py: check_store(store, full=True, progress=None) -> ScrubReport(damages=[Damage(file, offset, message, still)], files, bytes_read)
