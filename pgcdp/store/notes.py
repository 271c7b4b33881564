"""What this machine notes of a store, below PGCDP_ROOT: the catalog, and how far the store was scrubbed.

Nothing of it is needed to restore, and none of it is in the store: a copy of that is read as it is, also where nothing
can be written. Each place that a store lies at has notes of its own, since a copy may be older than what it is one of.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import xxhash

from pgcdp.fsio import sync_directory
from pgcdp.sets import root_directory
from pgcdp.store.layout import Store


def notes_of(store: Store) -> Path:
    """The directory of the notes on a store; it need not exist."""
    place = xxhash.xxh3_64_hexdigest(os.fsencode(os.path.realpath(store.path)))
    return root_directory() / "var/cache/pgcdp" / f"{store.set_id.hex()}-{place}"


def make_notes(store: Store) -> Path | None:
    """The same, made where it is missing, 0700; None when this user may not."""
    place = notes_of(store)
    if not os.path.isdir(place):  # also when it cannot be seen
        with suppress(OSError):
            place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            place.mkdir(mode=0o700, exist_ok=True)
            sync_directory(place.parent)
    return place if os.access(place, os.W_OK) else None


def clear_old_catalog(store: Store) -> None:
    """Remove the catalog that versions before this one kept in the store."""
    for name in ("catalog.db", "catalog.db-wal", "catalog.db-shm"):
        (store.path / name).unlink(missing_ok=True)
