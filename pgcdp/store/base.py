"""The oldest boundary: that of the baseline, or the one up to which retention let go of everything (FORMAT.md 3.10).

`base/NNNNNNNNNN` is published by rename, as an interval is. From then on no interval up to N counts (`Store.spans`).
All that is restored begins with that boundary, so it is written twice: `manifest.json` and `boundary.json` say the
same, and one that is damaged costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import xxhash

from pgcdp.errors import DamageError
from pgcdp.fsio import (
    make_directory,
    publish_directory,
    read_file,
    read_json,
    sync_directory,
    write_file,
    write_json,
)
from pgcdp.records import Boundary, Span
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import summary_of
from pgcdp.store.layout import Store, boundary_from
from pgcdp.store.published import published
from pgcdp.store.thinning import Commit

COPIES = ("manifest.json", "boundary.json")
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
    """The oldest boundary; None while the baseline is not complete. DamageError when both copies are damaged."""
    while True:
        place = base_place(store)
        if place is None:
            return store.baseline
        try:
            return boundary_from(_content(store, place)["boundary"], place / COPIES[0])
        except DamageError:
            if base_place(store) == place:  # else retention moved on, and removed this one just now
                raise


def missing_before(store: Store, number: int, first: int) -> Path | None:
    """What is missing between boundary `number` and interval `first`; None when they follow each other.

    Where there is no oldest boundary but a directory for it, it is that boundary which is lost.
    """
    if first == number + 1:
        return None
    if not number and store.bases.is_dir():
        return store.bases / f"{first - 1:010d}"
    return store.interval(number + 1)


def latest_before(store: Store) -> int:
    """The latest wall clock, in ns, of all that retention let go of before the oldest boundary; 0 for nothing."""
    place = base_place(store)
    return int(_content(store, place).get("latest_ns", 0)) if place else 0


def _content(store: Store, place: Path) -> dict[str, Any]:
    """What the first whole copy says. Raises DamageError about the first one when there is none."""
    damages = list[DamageError]()
    for name in COPIES:
        try:
            return _copy(store, place / name)
        except DamageError as damage:
            damages.append(damage)
    raise damages[0]


def _copy(store: Store, file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise DamageError(f"{file} is missing (offset 0)", "pgcdp check --full tells what can be restored") from None
    except OSError as error:
        raise DamageError(f"{file} cannot be read at offset 0: {error.strerror}") from None
    if content.get("set_id") != store.set_id.hex() or content.get("number") != int(file.parent.name):
        raise DamageError(f"{file} is not that of this boundary of this set (offset 0)")
    return content


def base_settings(store: Store) -> dict[str, Any]:
    """Settings of Postgres at the oldest boundary; empty when nothing is known, or that is the baseline."""
    place = base_place(store)
    return read_json(place / "settings.json") if place else {}


def base_outside(store: Store) -> list[tuple[str, str]] | None:
    """Data of the cluster that was captured by nobody at the oldest boundary; None: that was not known.

    At boundary 0 there is none: `protect` refuses it. Raises as `read_base`.
    """
    while True:
        place = base_place(store)
        if place is None:
            return []
        try:
            said = _content(store, place).get("outside")
        except DamageError:
            if base_place(store) == place:
                raise
        else:
            return None if said is None else [(name, where) for name, where in said]


def check_copies(store: Store) -> None:
    """Read both copies of the oldest boundary. Raises DamageError, also when one is left."""
    place = base_place(store)
    if place is None:
        return
    for name in COPIES:
        boundary_from(_copy(store, place / name)["boundary"], place / name)


def check_kept(store: Store) -> None:
    """Read what is kept with the oldest boundary. Raises DamageError."""
    place = base_place(store)
    if place is None:
        return
    for name, entry in _content(store, place)["files"].items():
        raw = (place / name).read_bytes() if (place / name).exists() else b""
        if len(raw) != entry["bytes"] or xxhash.xxh3_64_hexdigest(raw) != entry["checksum"]:
            raise DamageError(f"{place / name} has another checksum than its manifest says (offset 0)")
        read_file(place / name)


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
            # Not copied: what is encrypted is bound to the directory's name, which of a joined interval is another.
            write_file(work / name, read_file(bundle.path / name))
            files[name] = summary_of(work / name).entry()
    gone = [each.interval.to_time_ns for each in published(store).values() if each.interval.number <= boundary.number]
    content = {
        "format": 1,
        "set": store.set_name,
        "set_id": store.set_id.hex(),
        "number": boundary.number,
        "boundary": boundary._asdict(),
        "latest_ns": max([latest_before(store), *gone]),
        "outside": bundle.interval.outside,
        "files": files,
    }
    for name in COPIES:
        write_json(work / name, content)
    make_directory(store.bases)
    with commit():
        publish_directory(work, store.bases / work.name)
    sync_directory(store.path)
    return boundary
