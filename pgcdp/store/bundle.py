"""A published interval: immutable, complete, and telling by its manifest what each file must be (FORMAT.md 3.1).

What is published is whole: every file is finished and synced, the manifest is written last, and only then is the
directory renamed to its place below `intervals/`. So a directory there without a valid manifest is damage.

Retention replaces the manifest once, by one that names `forward` instead of `writes` (`store.thinning`). No file that a
manifest ever named changes; what the present one does not name is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pgcdp.errors import BugError, DamageError, TargetError
from pgcdp.fsio import publish_directory, read_file, read_json, write_json
from pgcdp.records import BLOCK, EXTENT, EXTENT_DATA, INDEX, Boundary, Gap, Interval, Rewind, Span
from pgcdp.store.frames import FileSummary, FrameReader, summary_of
from pgcdp.store.gaps import GapFinder
from pgcdp.store.layout import Store, boundary_from
from pgcdp.store.open_interval import OUTSIDE, SETTINGS, OpenInterval, OpenSnapshot, read_open
from pgcdp.store.rewinds import pair, said_in

__all__ = ["Bundle", "Increments", "OpenInterval", "OpenSnapshot", "publish", "read_open"]

CONTENTS = {
    "writes": b"WRIT", "index": b"INDX", "backward": b"BWRD", "backward.map": b"BMAP", "forward.map": b"FMAP",
    "forward": b"FWRD",
}  # fmt: skip
NEEDED = {
    True: ("writes", "index", "backward", "backward.map", "forward.map", "settings.json"),
    False: ("forward", "backward", "backward.map", "forward.map", "settings.json"),
}
"""Files that restoring needs, by whether single writes can be restored."""


EVENTS, CATALOG_NOTES, WAL_STATE = "events.json", "catalog.notes", "wal.state"
"""Files of the transaction index (FORMAT.md 3.5 to 3.7) beside those of `store.transactions`."""


@dataclass(frozen=True, slots=True)
class IndexFiles:
    """The transaction index of an interval as it lies in its incoming directory, synced; and what to say of it."""

    files: tuple[FileSummary, ...]
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Increments:
    """Both increments of an interval as they stand in its incoming directory, finished and synced.

    `forward`: what the forward map says, an array EXTENT.
    """

    backward: FileSummary
    backward_map: FileSummary
    forward_map: FileSummary
    blocks: int
    forward: NDArray[np.void]


def publish(
    store: Store,
    opened: OpenInterval,
    boundary: Boundary,
    streams: Sequence[FileSummary],
    increments: Increments,
    settings: dict[str, Any],
    indexed: IndexFiles | None = None,
    owned: FileSummary | None = None,
) -> Bundle:
    """Write settings and manifest and rename the directory to its place. `streams`: finished `writes` and `index`.

    `indexed`: the transaction index, None when it could not be made; `owned`: whose the changed blocks are, likewise.

    Raises BugError when the interval does not end exactly at the boundary.
    """
    if opened.number != boundary.number or opened.last_write != boundary.write:
        raise BugError(
            f"interval {opened.number} ends with write {opened.last_write}, "
            f"boundary {boundary.number} is at write {boundary.write}"
        )
    place = opened.path
    write_json(place / "settings.json", settings)
    files = {s.name: s for s in (*streams, increments.backward, increments.backward_map, increments.forward_map)}
    files["settings.json"] = summary_of(place / "settings.json")
    files.update({summary.name: summary for summary in (indexed.files if indexed else ())})
    if owned is not None:
        files[owned.name] = owned
    index = opened.index()
    walls = index["wall_ns"]
    rewinds = rewinds_of(opened)
    gaps = gaps_of(opened)
    outside = read_json(place / OUTSIDE)["outside"] if (place / OUTSIDE).exists() else None
    write_json(
        place / "manifest.json",
        {
            "format": 1,
            "set": store.set_name,
            "set_id": store.set_id.hex(),
            "number": opened.number,
            "from_write": opened.from_write,
            "to_write": opened.last_write,
            "from_time_ns": int(walls.min()),
            "to_time_ns": int(walls.max()),
            "boundary": boundary._asdict(),
            "writes": len(index),
            "bytes_written": int(index["data_length"].sum()),
            "blocks_changed": increments.blocks,
            "restorable_by_write": True,
            "stored": {
                "writes": files["writes"].bytes,
                "backward": files["backward"].bytes + files["backward.map"].bytes,
                "forward": files["forward.map"].bytes,
                "index": files["index"].bytes + (owned.bytes if owned else 0),
                "transactions": sum(summary.bytes for summary in (indexed.files if indexed else ())),
            },
            "transactions": indexed.summary if indexed else None,
            **({"rewinds": [asdict(rewind) for rewind in rewinds]} if rewinds else {}),
            **({"gaps": [asdict(gap) for gap in gaps]} if gaps else {}),
            "outside": outside,
            "files": {name: summary.entry() for name, summary in files.items()},
            "increments": {
                "backward": files["backward"].checksum,
                "backward_map": files["backward.map"].checksum,
                "forward_map": files["forward.map"].checksum,
                "blocks": increments.blocks,
            },
        },
    )
    opened.close()
    for name in ("boundary.json", OUTSIDE):
        (place / name).unlink(missing_ok=True)
    publish_directory(place, store.interval(opened.number))
    return Bundle.open(store, opened.number)


def rewinds_of(opened: OpenInterval) -> list[Rewind]:
    """Rewinds in place that an interval holds before it is published."""
    index = opened.index()
    places = index["position"], index["data_length"]
    with ExitStack() as stack:
        data = cache(lambda: stack.enter_context(opened.reader()))  # hardly any interval has one
        return pair(said_in(index, lambda row: data().read(*(int(column[row]) for column in places))))


def gaps_of(opened: OpenInterval) -> list[Gap]:
    """Gaps that an interval holds before it is published."""
    index, finder = opened.index(), GapFinder()
    places = index["position"], index["data_length"]
    with ExitStack() as stack:
        data = cache(lambda: stack.enter_context(opened.reader()))
        finder.take(index, lambda row: data().read(*(int(column[row]) for column in places)))
    return finder.found


class Bundle:
    """A published interval. `interval` is what its manifest tells, `path` its directory.

    In the manifest `from_time_ns` is the earliest wall clock of its writes and `to_time_ns` the latest.
    Readers belong to the caller, who closes them. Raises DamageError with file and offset.
    """

    def __init__(self, store: Store, path: Path, manifest: dict[str, Any], interval: Interval) -> None:
        self.path = path
        self.manifest = manifest
        self.interval = interval
        self._set_id = store.set_id

    @classmethod
    def open(cls, store: Store, number: int) -> Bundle:
        """Open by manifest. A file is compared with it when it is read: who needs another one is not refused.

        TargetError if missing.
        """
        span = store.span_of(number)
        if span is None:
            raise TargetError(
                f"boundary {number} of {store.path} was let go of by retention", "pgcdp info lists what exists"
            )
        return cls.at(store, span)

    @classmethod
    def at(cls, store: Store, span: Span) -> Bundle:
        """As `open`, of one that `Store.spans` lists."""
        try:
            return cls._at(store, span)
        except DamageError:
            # Retention may have replaced the manifest that was read, and what only that one named may be gone.
            return cls._at(store, span)

    @classmethod
    def _at(cls, store: Store, span: Span) -> Bundle:
        number, path = span.last, store.place(span)
        place = path / "manifest.json"
        try:
            manifest = read_json(place)
        except FileNotFoundError:
            if path.is_dir():
                raise DamageError(f"{place} is missing (offset 0)", _still(number)) from None
            raise TargetError(f"{store.path} has no interval {number}", "pgcdp info lists what exists") from None
        except DamageError as damage:
            raise DamageError(damage.message, _still(number)) from None
        if manifest.get("set_id") != store.set_id.hex() or manifest.get("number") != number:
            raise DamageError(f"{place} is not that of interval {number} of this set (offset 0)", _still(number))
        try:
            apart = ("boundary", "rewinds", "gaps", "covers", "outside")
            names = [name for name in Interval._fields if name not in apart]
            interval = Interval(
                **{name: manifest[name] for name in names},
                covers=int(manifest.get("covers", 1)),
                boundary=boundary_from(manifest["boundary"], place),
                rewinds=tuple(Rewind(**each) for each in manifest.get("rewinds", ())),
                gaps=tuple(Gap(**each) for each in manifest.get("gaps", ())),
                outside=_outside(manifest.get("outside")),
            )
            for name in NEEDED[interval.restorable_by_write]:
                int(manifest["files"][name]["bytes"])
        except (KeyError, TypeError):
            raise DamageError(f"{place} lacks keys (offset 0)", _still(number)) from None
        if interval.span != span:
            raise DamageError(f"{place} is that of intervals {interval.span.file_name} (offset 0)", _still(number))
        return cls(store, path, manifest, interval)

    @property
    def number(self) -> int:
        """Number of the interval."""
        return self.interval.number

    @property
    def transactions(self) -> dict[str, Any] | None:
        """Number of transactions, lowest and highest LSN, xid, time and write; None when they are not indexed."""
        found: dict[str, Any] | None = self.manifest.get("transactions")
        return found

    def _reader(self, name: str) -> FrameReader:
        try:
            reader = FrameReader.open(self.path / name, CONTENTS[name], self._set_id, self.number)
        except FileNotFoundError:
            self.manifest = read_json(self.path / "manifest.json")  # retention may have replaced it since
            self._refuse_gone(name, "its single writes")
            raise DamageError(f"{self.path / name} is missing (offset 0)", _still(self.number)) from None
        except DamageError:
            self.check_size(name)  # else it is told as what it is: cut short
            raise
        if reader.length != self.manifest["files"][name]["length"]:
            reader.close()
            raise DamageError(f"{self.path / name} has a stream that its manifest does not know (offset 0)")
        return reader

    def _table(self, name: str, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        with self._reader(name) as reader:
            return np.frombuffer(reader.read_stream(), dtype=dtype)

    def has(self, name: str) -> bool:
        """Whether the interval has this file."""
        return name in self.manifest["files"]

    def index(self) -> NDArray[np.void]:
        """The write index, an array INDEX in order of write number. TargetError when retention let go of it."""
        self._refuse_gone("index", "what its single writes were")
        return self._table("index", INDEX)

    def backward_map(self) -> NDArray[np.void]:
        """Array EXTENT, sorted by volume and block; source = position in `backward()`."""
        return self._table("backward.map", EXTENT)

    def forward_map(self) -> NDArray[np.void]:
        """Array EXTENT, sorted by volume and block; source = position in `forward()`."""
        extents = self._table("forward.map", EXTENT)
        return extents if self.interval.restorable_by_write else packed(extents)[0]

    @property
    def forward_file(self) -> str:
        """Name of the file that `forward_map` points into."""
        return "writes" if self.interval.restorable_by_write else "forward"

    def forward(self) -> FrameReader:
        """What `forward_map` points into."""
        return self._reader(self.forward_file)

    def writes(self) -> FrameReader:
        """The data of the interval's writes. TargetError when retention let go of them."""
        self.need_writes()
        return self._reader("writes")

    def need_writes(self) -> None:
        """Raises TargetError when retention let go of the single writes."""
        self._refuse_gone("writes", "its single writes")

    def _refuse_gone(self, name: str, what: str) -> None:
        if not self.has(name):
            first, last = self.interval.first, self.number
            raise TargetError(
                f"of interval {last} retention let go of {what}: only its boundaries can be restored",
                f"--target-boundary {first - 1} is where it begins, --target-boundary {last} where it ends",
            )

    def backward(self) -> FrameReader:
        """Contents of the changed blocks at boundary n-1."""
        return self._reader("backward")

    def settings(self) -> dict[str, Any]:
        """Postgres's settings at the boundary, as they were given to `publish`, compared with the manifest."""
        self.check_file("settings.json")
        return read_json(self.path / "settings.json")

    def check_size(self, name: str) -> None:
        """Compare the size of one file, without reading it. Raises DamageError."""
        path, wanted = self.path / name, int(self.manifest["files"][name]["bytes"])
        if not path.exists():
            raise DamageError(f"{path} is missing (offset 0)", _still(self.number))
        if path.stat().st_size != wanted:
            raise DamageError(f"{path} ends at offset {path.stat().st_size} instead of {wanted}", _still(self.number))

    def check_file(self, name: str, *, frames: bool = True) -> None:
        """Read one file whole: every frame, then the checksum of the manifest. Raises DamageError.

        Without `frames`, which somebody has read, only the checksum.
        """
        path = self.path / name
        self.check_size(name)
        if frames and name in CONTENTS:
            with self._reader(name) as reader:
                for _ in reader.frames():
                    pass
        digest = xxhash.xxh3_64()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != self.manifest["files"][name]["checksum"]:
            raise DamageError(f"{path} has another checksum than its manifest says (offset 0)", _still(self.number))
        if name not in CONTENTS:
            read_file(path)  # of an encrypted store, the checksum is that of what is encrypted

    def check(self) -> None:
        """Read everything: every file against the manifest, every frame, and that both maps name the same blocks."""
        for name in self.manifest["files"]:
            self.check_file(name)
        self.check_tie()

    def check_tie(self) -> None:
        """The tie of the increments: both maps are those of the manifest and name the same blocks; writes in order."""
        files, tie = self.manifest["files"], self.manifest["increments"]
        for name in ("backward", "backward.map", "forward.map"):
            if tie[name.replace(".", "_")] != files[name]["checksum"]:
                raise DamageError(f"{self.path / 'manifest.json'} ties another {name} (offset 0)", _still(self.number))
        backward, forward = _spans(self.backward_map()), _spans(self.forward_map())
        if not np.array_equal(backward, forward) or int((forward[:, 2] - forward[:, 1]).sum()) != tie["blocks"]:
            raise DamageError(
                f"{self.path / 'backward.map'} and forward.map name different blocks (offset 0)", _still(self.number)
            )
        if not self.interval.restorable_by_write:
            self._check_forward(tie)
        if not self.has("index"):
            return
        numbers = self.index()["number"].astype(np.int64)
        first, last = self.interval.from_write, self.interval.to_write
        if not np.array_equal(numbers, np.arange(first, last + 1)):
            raise DamageError(f"{self.path / 'index'} does not hold writes {first} to {last} (offset 64)")

    def _check_forward(self, tie: dict[str, Any]) -> None:
        entry = self.manifest["files"]["forward"]
        if tie.get("forward") != entry["checksum"]:
            raise DamageError(f"{self.path / 'manifest.json'} ties another forward (offset 0)", _still(self.number))
        length = packed(self._table("forward.map", EXTENT))[1]
        if length != entry["length"]:
            raise DamageError(
                f"{self.path / 'forward'} holds {entry['length']} bytes, forward.map names {length} (offset 0)",
                _still(self.number),
            )


def packed(extents: NDArray[np.void]) -> tuple[NDArray[np.void], int]:
    """A forward map over the contents that it names, one behind the other in order of `source`; and their length.

    Done again it changes nothing (FORMAT.md 3.10).
    """
    made = extents.copy()
    data = np.flatnonzero(extents["kind"] == EXTENT_DATA)
    data = data[np.argsort(extents["source"][data], kind="stable")]
    lengths = extents["count"][data].astype(np.uint64) * np.uint64(BLOCK)
    ends = np.cumsum(lengths, dtype=np.uint64)
    made["source"][data] = ends - lengths
    return made, int(ends[-1]) if len(ends) else 0


def _outside(said: list[list[str]] | None) -> tuple[tuple[str, str], ...] | None:
    return None if said is None else tuple((name, place) for name, place in said)


def _spans(extents: NDArray[np.void]) -> NDArray[np.int64]:
    """Rows (volume, first block, block behind) of the blocks that a sorted map names, adjacent extents joined."""
    if not len(extents):
        return np.empty((0, 3), dtype=np.int64)
    volume = extents["volume"].astype(np.int64)
    begin = extents["block"].astype(np.int64)
    end = begin + extents["count"].astype(np.int64)
    first = np.ones(len(extents), dtype=bool)
    first[1:] = (volume[1:] != volume[:-1]) | (begin[1:] != end[:-1])
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(extents)) - 1
    return np.stack([volume[starts], begin[starts], end[ends]], axis=1)


def _still(number: int) -> str:
    return f"boundary {number} and everything behind it can still be restored if nothing else is damaged"


def settings_behind(store: Store, last: int) -> dict[str, Any]:
    """What is known of the cluster's settings behind interval `last` (as `session.settings`), empty when nothing."""
    try:
        found = read_json(store.incoming(last + 1) / SETTINGS)
    except (FileNotFoundError, DamageError):
        found = {}
    if found or not last:
        return found
    return Bundle.open(store, last).settings()
