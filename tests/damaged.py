"""Damage to a real store and journal, and which points need what was damaged, told from the writes alone.

The store is made by pgcdp from a journal; what a point must be, and what it needs, is said by a model that knows only
the list of writes. A file's damage is described to `Needs` by its path and the byte; whatever is unsure is None.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgcdp import twice
from pgcdp.capture.engine import run_engine
from pgcdp.errors import DamageError, PgcdpError
from pgcdp.records import Target
from pgcdp.store.catalog import Catalog, catalog_file
from pgcdp.store.history import add_history
from pgcdp.store.mirroring import what_differs
from pgcdp.store.rebuild import rebuild
from pgcdp.store.scrub import check_store
from tests.journal_writer import BLOCK
from tests.unit.test_blockmap import Scene, materialized
from tests.unit.test_increments import BLOCKS

NAMES = ("writes", "index", "backward", "backward.map", "forward.map", "settings.json", "manifest.json")
KINDS = ("bundle", "bundle", "image", "image", "manifest", "journal", "catalog")
TAIL = 6
"""Writes that are in the journal alone."""


@dataclass(frozen=True)
class Hit:
    """One damage: from a byte on, which is flipped, or behind which all is gone (-1: the file is missing)."""

    kind: str
    file: Path
    offset: int
    how: str


class Damaged:
    """A history of some intervals with the image at the newest, an open interval, and a tail in the journal."""

    def __init__(self, place: Path, seed: int) -> None:
        self.scene = Scene(place, seed, [9, 14, 7, 11], 8, TAIL)
        self.store = self.scene.world.store
        self.place = place
        self.chooser = random.Random(seed)
        taken = len(self.scene.world.ops) - TAIL
        self.scene.world.writer.mark(len(self.scene.world.ops), taken, len(self.scene.world.ops))
        for number in range(20):
            add_history(self.store, "verification", 1000 + number, {"interval": 2, "ok": number % 3 > 0})
        rebuild(self.store)[0].close()
        self.catalog_said = self.catalog_says()
        source = self.scene.source()
        self.ends = [0, *(each.to_write for each in source.intervals())]
        self.newest = len(self.scene.world.ops)
        inside = [self.chooser.randint(a + 1, b) for a, b in zip(self.ends, [*self.ends[1:], self.newest], strict=True)]
        self.points = sorted({*self.ends[1:], *inside, self.newest})
        self.expected = {write: self.scene.at(write) for write in self.points}

    def catalog_says(self) -> object:
        """All that anybody is told from it."""
        catalog = Catalog.open(self.store)
        try:
            return catalog.intervals(), catalog.history("event"), catalog.history("verification")
        finally:
            catalog.close()

    # --- the model

    def _touched(self, volume: int, block: int, first: int, last: int) -> bool:
        """Whether one of writes `first` to `last` writes to a block."""
        return any(
            op.volume == volume and op.offset <= block * BLOCK < op.offset + op.length
            for op in self.scene.world.ops[first - 1 : last]
        )

    def _needs_block(self, write: int, volume: int, block: int) -> bool:
        """Whether a point needs a block of the image, which is at the last boundary."""
        if write >= self.ends[-1]:
            return not self._touched(volume, block, self.ends[-1] + 1, write)
        before = max(end for end in self.ends if end <= write)
        return not self._touched(volume, block, before + 1, self.ends[-1])

    def needs(self, hit: Hit, write: int) -> bool | None:
        """Whether a point needs what was hit; None: it may."""
        name = hit.file.name
        if hit.kind in ("catalog",) or name == "settings.json" or name == "forward.map":
            return False
        if hit.kind == "journal":
            return False if write <= self.ends[-1] else None
        if hit.kind == "image":
            return self._needs_of_image(hit, write)
        number = int(hit.file.parent.name)
        first, last = self.ends[number - 1] + 1, self.ends[number]
        if name == "manifest.json":
            return write < last
        if name == "backward.map" or (name == "backward" and hit.how == "missing"):
            return write < last
        if name == "backward":
            return None if write < last else False
        if name == "index":
            return first <= write < last
        return None if first <= write < last else False

    def _needs_of_image(self, hit: Hit, write: int) -> bool | None:
        if hit.file.name in twice.STATE.names:
            return False  # the other one is whole
        if hit.how == "missing":
            return None
        volume = {"data": 0, "wal": 1}[hit.file.name.split(".")[0]]
        first = hit.offset // (BLOCK if hit.file.suffix == ".img" else 8)
        if hit.how == "flipped":
            return self._needs_block(write, volume, first)
        needed = any(self._needs_block(write, volume, block) for block in range(first, BLOCKS))
        return None if needed else False  # what is gone may have been zeros, which is what is read there

    # --- what happens

    def outcome(self, write: int) -> DamageError | None:
        """Make one point; wrong bytes are an AssertionError."""
        source = self.scene.source()
        try:
            point = source.resolve(Target("write", write))
            with source.held():
                found = materialized(source, point, self.place)
        except DamageError as damage:
            return damage
        assert found == self.expected[write], f"wrong bytes were served: write {write}"
        return None

    def found(self, hit: Hit) -> bool:
        """Whether a check of everything finds it, and names the file (its neighbour, where one tells of the other)."""
        if hit.kind == "journal":
            try:
                run_engine(["check", "--journal", os.fspath(self.scene.world.journal.directory)])
            except DamageError as damage:  # of a segment's first batch, the place behind the one before is named
                return str(hit.file.parent) in damage.message
            return False
        if hit.kind == "catalog":
            try:  # one that is missing is made anew, and told of
                return not hit.file.exists() or bool(what_differs(self.store))
            except PgcdpError:
                return True
        damages = check_store(self.store).damages
        beside = {hit.file, hit.file.with_suffix(".img"), hit.file.parent}
        if hit.file.suffix != ".img":
            beside |= {hit.file.parent / "manifest.json", hit.file.parent / "writes"}
        return any(each.file in beside or str(hit.file) in each.message for each in damages)

    def examine(self, hit: Hit) -> dict[str, Any]:
        """Everything that must hold while the damage is there; a row of the result."""
        found = self.found(hit)
        lost = []
        for write in self.points:
            damage = self.outcome(write)
            needed = self.needs(hit, write)
            said = f"{hit}: write {write} {'needs' if needed else 'does not need'} it: {damage}"
            assert needed is None or needed == (damage is not None), said
            if damage is not None:
                assert "offset" in damage.message or ".seg is missing" in damage.message, damage.message
                lost.append(write)
        unread = False
        if hit.kind == "catalog" and not found:  # bytes of its pages that hold nothing need not be noticed
            unread = self.catalog_says() == self.catalog_said
        assert found or unread, f"{hit} was not found"
        return {
            "kind": hit.kind, "file": hit.file.name, "how": hit.how, "offset": hit.offset,
            "lost": len(lost), "points": len(self.points),
            **({"unread": True} if unread else {}),
        }  # fmt: skip

    # --- choosing

    def choose(self, kind: str) -> Path:
        """A file of a kind, that can be damaged."""
        match kind:
            case "journal":
                segments = self.scene.world.journal.segments()
                return self.scene.world.writer.path(self.chooser.choice(segments))
            case "image":
                names = [f"{volume.name}.{suffix}" for volume in self.store.volumes for suffix in ("img", "sums")]
                return self.store.image / self.chooser.choice([*names, *twice.STATE.names])
            case "catalog":
                return catalog_file(self.store)
        number = self.chooser.randint(1, len(self.ends) - 1)
        name = "manifest.json" if kind == "manifest" else self.chooser.choice(NAMES[:-1])
        return self.store.interval(number) / name


def flips(damaged: Damaged, kind: str) -> Hit:
    """A place for one flip: of a journal inside of an acknowledged batch."""
    file = damaged.choose(kind)
    size = file.stat().st_size
    if kind == "journal":
        placed = damaged.scene.world.writer.placed
        size = max(
            each.offset + each.length for each in placed if damaged.scene.world.writer.path(each.segment) == file
        )
    return Hit(kind, file, damaged.chooser.randrange(size), "flipped")


@contextmanager
def done(hit: Hit, bit: int) -> Iterator[None]:
    """The damage is there inside."""
    whole = hit.file.read_bytes()
    status = hit.file.stat()
    if hit.how == "missing":
        hit.file.unlink()
    elif hit.how == "cut short":
        os.truncate(hit.file, hit.offset)
    else:
        with hit.file.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes([whole[hit.offset] ^ (1 << bit)]), hit.offset)
        os.utime(hit.file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does it
    try:
        yield
    finally:
        hit.file.write_bytes(whole)
        os.utime(hit.file, ns=(status.st_atime_ns, status.st_mtime_ns))


def losses(damaged: Damaged, kind: str) -> Hit:
    """A file that is missing, or cut short: of the journal a segment, inside of what was acknowledged."""
    file = damaged.choose(kind)
    if kind == "journal":  # that of a segment whose writes the store has all, is used again or given away anyway
        writer = damaged.scene.world.writer
        held = {each.segment for each in writer.placed if each.last > damaged.newest - TAIL}
        file = writer.path(damaged.chooser.choice(sorted(held)))
    if damaged.chooser.random() < 0.5:
        return Hit(kind, file, 0, "missing")
    return Hit(kind, file, damaged.chooser.randrange(file.stat().st_size), "cut short")
