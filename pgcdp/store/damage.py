"""What a damage costs: which writes cannot be restored for it.

A point in interval j needs: the writes of j up to it, the backward increments j, j+1, ... k, and the image at k, each
block from the first of these that has it. So damaged writes cost points inside one interval, a damaged backward
increment costs points in its own and earlier intervals, and a damaged image block costs points behind the last
interval that changed it.

This says at most too much: a block that is damaged may be hidden by what comes later (`recovery.materializing`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgcdp import twice
from pgcdp.errors import DamageError, PgcdpError, PreconditionError, TargetError
from pgcdp.records import BLOCK, Boundary
from pgcdp.store.bundle import CONTENTS, NEEDED, Bundle
from pgcdp.store.frames import FrameReader
from pgcdp.store.image import ImageState, read_state
from pgcdp.store.image_files import Sealed, Summed
from pgcdp.store.layout import Store
from pgcdp.store.published import Published

Range = tuple[int, int | None]
"""Writes from the first to the last one, both included; None: to the newest, also what comes."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage: file, offset in it, what is wrong, what can still be restored.

    `lost`: the writes that cannot be restored for it; None: all can. `part`: of the store, as the scrub names it.
    """

    file: Path
    offset: int
    message: str
    still: str
    lost: Range | None = None
    part: str = ""


def place_in(store: Store, message: str) -> tuple[Path, int] | None:
    """File and offset that a message names; None when it names none of this store."""
    found = re.search(re.escape(str(store.path)) + r"/(?:[\w.-]+/)*[\w.-]*\w", message)
    if found is None:
        return None
    offset = re.search(r"offset (\d+)", message[found.end() :])
    return Path(found[0]), int(offset[1]) if offset else 0


class Costs:
    """What damage in a store costs, whose oldest boundary and listed intervals are these."""

    def __init__(self, store: Store, base: Boundary, listed: Mapping[int, Published]) -> None:
        self.store = store
        self.base = base
        self.listed = listed
        self.state: ImageState | None = None
        with suppress(DamageError, PreconditionError):
            self.state = read_state(store)

    def lost(self, file: Path, offset: int) -> Range | None:
        """The writes that cannot be restored when a file is damaged at an offset (missing or cut short: from there)."""
        try:
            parts = file.relative_to(self.store.path).parts
        except ValueError:
            return None
        everything: Range = (self.base.write, None)
        match parts:
            case ("image", name) if name in twice.STATE.names:
                return everything if self.state is None else None
            case ("image", name) if name.endswith((".img", ".sums")):
                return self._of_file(name, offset)
            case ("incoming", *_):
                return self._behind_last(), None
            case ("intervals", name, *rest) if name.isdigit():
                return self._of_interval(int(name), rest[0] if rest else "", offset)
            case ("joined", name, *rest) if re.fullmatch(r"\d{10}-\d{10}", name):
                return self._of_interval(int(name[11:]), rest[0] if rest else "", offset)
        return None

    def _behind_last(self) -> int:
        last = max(self.listed, default=0)
        return (self.listed[last].interval.to_write if last else self.base.write) + 1

    def _of_interval(self, number: int, name: str, offset: int) -> Range | None:
        holding = [
            each.interval for each in self.listed.values() if each.interval.first <= number <= each.interval.number
        ]
        if not holding:
            return (self._behind_last(), None) if number > max(self.listed, default=0) else None
        (interval,) = holding
        at = self.state.boundary if self.state is not None else 0
        moving = self.state is not None and self.state.to == interval.number
        behind = moving or interval.number > at
        before = moving or interval.number <= at
        if name in ("", "manifest.json"):
            if moving:
                return self.base.write, None
            return (interval.from_write, None) if behind else (self.base.write, interval.to_write - 1)
        if name in ("backward", "backward.map"):
            return (self.base.write, interval.to_write - 1) if before else None
        if name == "forward.map" or name == "forward":
            return (interval.to_write, None) if behind else None
        if name == "index":
            return interval.from_write, interval.to_write - 1
        if name == "writes":
            first = interval.from_write + self._whole_writes(number, offset)
            return first, None if behind else max(first, interval.to_write - 1)
        return None

    def _whole_writes(self, number: int, offset: int) -> int:
        """How many of the interval's writes lie before a frame of its `writes`; 0 when that cannot be told."""
        with suppress(PgcdpError, OSError):
            bundle = Bundle.open(self.store, number)
            with FrameReader.open(bundle.path / "writes", CONTENTS["writes"], self.store.set_id, number) as reader:
                before = [each for each in reader.entries if each.offset <= offset]
                position = before[-1].position if before else 0
            index = bundle.index()
            ends = (index["position"] + index["data_length"]).astype(np.int64)
            return int(np.searchsorted(ends, position, side="right"))
        return 0

    def _of_file(self, name: str, offset: int) -> Range:
        stem, suffix = name.rsplit(".", 1)
        volume = next((each.number for each in self.store.volumes if each.name == stem), None)
        if volume is None:
            return self.base.write, None
        return self.of_blocks(volume, offset // (BLOCK if suffix == "img" else entry_bytes(self.store)), 1)

    def of_blocks(self, volume: int, first: int, count: int) -> Range:
        """Of blocks of the image: what has each of them in a backward increment can be restored.

        That is all before the newest interval that changed a block; for several, before the oldest of these.
        """
        at = self.state.boundary if self.state is not None else 0
        left = np.ones(count, dtype=np.bool_)
        for number in sorted((each for each in self.listed if each <= at), reverse=True):
            try:
                extents = Bundle.at(self.store, self.listed[number].interval.span).backward_map()
            except (DamageError, TargetError):
                continue
            of_volume = extents[extents["volume"] == volume]
            begin = of_volume["block"].astype(np.int64) - first
            end = begin + of_volume["count"].astype(np.int64)
            for row in np.flatnonzero((begin < count) & (end > 0)):
                left[max(0, int(begin[row])) : int(end[row])] = False
            if not left.any():
                return self.listed[number].interval.to_write, None
        return self.base.write, None


def entry_bytes(store: Store) -> int:
    """What NAME.sums has for a block."""
    return Sealed.unit if store.encrypted else Summed.unit


def look(store: Store, base: Boundary, listed: Mapping[int, Published]) -> list[Damage]:
    """What is missing or cut short, seen by names and sizes alone; intervals that cannot be read are among it."""
    costs = Costs(store, base, listed)
    found: list[Damage] = []

    def note(message: str, otherwise: Path) -> None:
        file, offset = place_in(store, message) or (otherwise, 0)
        lost = costs.lost(file, offset)
        found.append(Damage(file, offset, message, still_of(store, lost), lost))

    for each in listed.values():
        if each.damage:
            note(each.damage, each.path)
        elif _sizes_differ(each):
            try:
                bundle = Bundle.at(store, each.interval.span)
            except (DamageError, TargetError) as error:
                note(error.message, each.path / "manifest.json")
                continue
            for name in NEEDED[bundle.interval.restorable_by_write]:
                try:
                    bundle.check_size(name)
                except DamageError as damage:
                    note(damage.message, bundle.path / name)
    for volume in store.volumes:
        for suffix, size in (("img", volume.bytes), ("sums", volume.bytes // BLOCK * entry_bytes(store))):
            file = store.image / f"{volume.name}.{suffix}"
            length = file.stat().st_size if file.exists() else -1
            if length < size:
                told = "is missing (offset 0)" if length < 0 else f"ends at offset {length} instead of {size}"
                lost: Range = (base.write, None)
                found.append(Damage(file, max(0, length), f"{file} {told}", still_of(store, lost), lost))
    return found


def _sizes_differ(each: Published) -> bool:
    """Compared with what the catalog knows: to read ten thousand manifests would take seconds."""
    place, stored = each.path, each.interval.stored
    try:
        sizes = {name: (place / name).stat().st_size for name in NEEDED[each.interval.restorable_by_write]}
    except FileNotFoundError:
        return True
    with suppress(FileNotFoundError):
        sizes["index"] = sizes.get("index", 0) + (place / "files.parquet").stat().st_size
    contents = "writes" if each.interval.restorable_by_write else "forward"
    forward = sizes["forward.map"] + (0 if contents == "writes" else sizes["forward"])
    return (
        sizes["backward"] + sizes["backward.map"] != stored["backward"]
        or forward != stored["forward"]
        or sizes.get("writes", 0) != stored["writes"]
        or sizes.get("index", 0) != stored["index"]
    )


def still_of(store: Store, lost: Range | None) -> str:
    """In words, what can be restored without some writes."""
    if lost is None:
        return "every boundary and write can still be restored if nothing else is damaged"
    first, last = lost
    if last is None:
        return f"every point before write {first} can still be restored if nothing else is damaged"
    return f"every point but writes {first} to {last} can still be restored if nothing else is damaged"
