"""The oldest boundary: that of the baseline, or the one up to which retention let go of everything (FORMAT.md 3.10).

`base/NNNNNNNNNN` is published by rename, as an interval is. From then on no interval up to N counts (`Store.spans`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from pgcdp.errors import DamageError
from pgcdp.fsio import make_directory, publish_directory, read_json, sync_directory, sync_file, write_json
from pgcdp.records import Boundary, Span
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store, boundary_from
from pgcdp.store.thinning import Commit

KEPT = ("settings.json", "relations.parquet")
"""Of the interval that ended there: what is needed to open the boundary, and to name what comes behind it."""


def base_place(store: Store) -> Path | None:
    """The directory of the oldest boundary; None when that is the baseline."""
    number = store.base_number()
    return store.bases / f"{number:010d}" if number else None


def places_back(store: Store, number: int) -> Iterator[Path]:
    """Directories of the intervals up to `number`, newest first, at last that of the oldest boundary."""
    plain = store.interval(number)
    if plain.is_dir() and store.span_of(number) == Span(number, number):  # most who ask need no other
        yield plain
        number -= 1
    yield from (store.place(span) for span in reversed(store.spans()) if span.last <= number)
    base = base_place(store)
    if base is not None:
        yield base


def read_base(store: Store) -> Boundary | None:
    """The oldest boundary; None while the baseline is not complete. Raises DamageError."""
    place = base_place(store)
    if place is None:
        return store.baseline
    manifest = place / "manifest.json"
    try:
        content = read_json(manifest)
    except FileNotFoundError:
        raise DamageError(f"{manifest} is missing (offset 0)") from None
    if content.get("set_id") != store.set_id.hex():
        raise DamageError(f"{manifest} is not of this set (offset 0)")
    return boundary_from(content["boundary"], manifest)


def base_settings(store: Store) -> dict[str, Any]:
    """Settings of Postgres at the oldest boundary; empty when nothing is known, or that is the baseline."""
    place = base_place(store)
    return read_json(place / "settings.json") if place else {}


def check_base(store: Store) -> None:
    """Read all that is kept of the oldest boundary. Raises DamageError."""
    place = base_place(store)
    if place is None:
        return
    read_base(store)
    for name, entry in read_json(place / "manifest.json")["files"].items():
        raw = (place / name).read_bytes() if (place / name).exists() else b""
        if len(raw) != entry["bytes"] or xxhash.xxh3_64_hexdigest(raw) != entry["checksum"]:
            raise DamageError(f"{place / name} has another checksum than its manifest says (offset 0)")


def publish_base(store: Store, span: Span, commit: Commit = nullcontext) -> Boundary:
    """Make the boundary that an interval ends at the oldest one, durably. Nothing is removed by this."""
    bundle = Bundle.at(store, span)
    boundary = bundle.interval.boundary
    work = store.aside / f"{boundary.number:010d}"
    make_directory(work)
    files = {}
    for name in KEPT:
        if bundle.has(name):
            bundle.check_file(name)
            shutil.copyfile(bundle.path / name, work / name)
            sync_file(work / name)
            files[name] = bundle.manifest["files"][name]
    write_json(
        work / "manifest.json",
        {
            "format": 1,
            "set": store.set_name,
            "set_id": store.set_id.hex(),
            "number": boundary.number,
            "boundary": asdict(boundary),
            "files": files,
        },
    )
    make_directory(store.bases)
    with commit():
        publish_directory(work, store.bases / work.name)
    sync_directory(store.path)
    return boundary
