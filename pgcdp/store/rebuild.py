"""The catalog anew from the store alone: store.json, manifests and history files."""

from __future__ import annotations

import os
from contextlib import suppress

from pgcdp import keys, twice
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import FILE_NAME, Catalog, catalog_file
from pgcdp.store.gaps import keep as keep_gaps
from pgcdp.store.history import history_names, read_history
from pgcdp.store.layout import Store
from pgcdp.store.notes import make_notes
from pgcdp.store.rewinds import keep as keep_rewinds


def rebuild(store: Store) -> tuple[Catalog, list[DamageError]]:
    """Make `catalog.db` anew; returns it with what could not be read and is therefore not in it. What the store has
    twice, of rewinds, gaps, its data key and what `twice` is for, it has twice again: the last where no agent runs.

    The new catalog is built beside the old one and takes its place by rename. Nobody else may have it open.
    """
    place = catalog_file(store)
    if make_notes(store) is None:
        raise PreconditionError(f"{place.parent} cannot be written", "run pgcdp rebuild as root")
    if store.encrypted:
        keys.mend_copies(store.path)
    with suppress(PreconditionError), store.lock():  # an agent that runs writes both, and mends them when it starts
        twice.mend(store.path)
    fresh = place.with_name(f"{FILE_NAME}.new")
    for leftover in (fresh, fresh.with_name(fresh.name + "-wal"), fresh.with_name(fresh.name + "-shm")):
        leftover.unlink(missing_ok=True)
    catalog = Catalog(store, fresh)
    damages: list[DamageError] = []
    try:
        if store.baseline is not None:
            catalog.put_baseline(store.baseline)
        for span in store.spans():
            try:
                bundle = Bundle.at(store, span)
                catalog.put_interval(bundle)
                keep_rewinds(store, bundle.interval.rewinds)
                keep_gaps(store, bundle.interval.gaps)
            except DamageError as damage:
                damages.append(damage)
        for name in history_names(store):
            try:
                kind, time_ns, content = read_history(store, name)
                catalog.put_history(name, kind, time_ns, content)
            except DamageError as damage:
                damages.append(damage)
    finally:
        catalog.close()
    for suffix in ("-wal", "-shm"):
        place.with_name(place.name + suffix).unlink(missing_ok=True)
    os.replace(fresh, place)
    return Catalog.open(store), damages
