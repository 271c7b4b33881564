"""Where things are in a store, and `store.json`, which says whose store it is (FORMAT.md section 3)."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pgcdp import keys, twice, wrapped
from pgcdp.capture.modes import close_to_others
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import FileLock, is_locked, make_directory
from pgcdp.records import Boundary, Span, Volume
from pgcdp.store.entries import entries

FORMAT = 1
TIMELINES = "timelines"
"""Directory of the history files of all timelines, and of what was archived; made by the first rewind in place."""
DIRECTORIES = ("image", "incoming", "intervals", "history")


def boundary_from(content: dict[str, Any], where: Path) -> Boundary:
    """A boundary as it stands in JSON. Raises DamageError naming the file when keys are missing."""
    try:
        return Boundary(**{name: content[name] for name in Boundary._fields})
    except (KeyError, TypeError):
        raise DamageError(
            f"{where} holds no whole boundary at offset 0", "pgcdp check --full tells what can be restored"
        ) from None


@dataclass(frozen=True)
class Store:
    """A store directory. `volumes` are in the order of their numbers, `baseline` is boundary 0 once there is one.

    `extra` are further keys of store.json, as `create` was given them. `encrypted` is decided when it is made.
    """

    path: Path
    set_name: str
    set_id: bytes
    volumes: tuple[Volume, ...]
    baseline: Boundary | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    encrypted: bool = False

    @classmethod
    def create(
        cls, path: Path, set_name: str, set_id: bytes, volumes: list[Volume], extra: dict[str, Any] | None = None
    ) -> Store:
        """Make a store in an empty or missing directory, or in what a killed `create` left; its parent must exist.

        It is encrypted when a key is given for it (`keys`). Raises PreconditionError if it is in use, or for that key.
        """
        if path.exists() and (not path.is_dir() or not _only_begun(path)):
            raise PreconditionError(f"{path} is not an empty directory", "name an empty directory with --store")
        if [volume.number for volume in volumes] != list(range(len(volumes))):
            raise PgcdpError(f"the volumes of set {set_name} are not numbered from 0")
        key = keys.user_key_for(path)
        make_directory(path)
        close_to_others(path)
        for name in DIRECTORIES:
            make_directory(path / name)
        keys.begin(path, set_id, key)
        store = cls(path, set_name, set_id, tuple(volumes), None, dict(extra or {}), key is not None)
        store._write()
        return store

    @classmethod
    def open(cls, path: Path, set_id: bytes | None = None, *, keyless: bool = False) -> Store:
        """Open a store; with `set_id`, only that of this set. PreconditionError if it is none or another's.

        From then on this process reads and writes it with its key; PreconditionError, too, when that is missing or
        wrong. `keyless`: for who reads only what is clear in every store; the key is not asked for.
        """
        try:
            content = twice.STORE.read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise PreconditionError(f"{path} has no store.json", "name a store with --store") from None
        if content.get("format") != FORMAT:
            raise PreconditionError(
                f"{path} has format {content.get('format')}, this pgcdp reads {FORMAT}", "use the pgcdp that wrote it"
            )
        known = {"format", "set", "set_id", "volumes", "baseline", "encrypted", "revision", twice.MARK}
        baseline = content.get("baseline")
        store = cls(
            path,
            str(content["set"]),
            bytes.fromhex(content["set_id"]),
            tuple(Volume(entry["number"], entry["name"], entry["bytes"]) for entry in content["volumes"]),
            None if baseline is None else boundary_from(baseline, path / "store.json"),
            {key: value for key, value in content.items() if key not in known},
            bool(content.get("encrypted")),
        )
        if set_id is not None and store.set_id != set_id:
            raise PreconditionError(
                f"{path} is the store of set {store.set_name} ({store.set_id.hex()}), not of {set_id.hex()}",
                "each set has a store of its own; name the right one with --store",
            )
        if not keyless:
            keys.open_store(path, store.set_id, store.encrypted)
        return store

    def _write(self) -> None:
        content: dict[str, Any] = {
            **self.extra,
            "format": FORMAT,
            "set": self.set_name,
            "set_id": self.set_id.hex(),
            "volumes": [asdict(volume) for volume in self.volumes],
            "baseline": None if self.baseline is None else self.baseline._asdict(),
            **({"encrypted": True} if self.encrypted else {}),
            "revision": twice.next_revision(self.path),
        }
        twice.STORE.write(self.path, content)

    def with_baseline(self, boundary: Boundary) -> Store:
        """The same store with boundary 0, written durably to store.json."""
        store = replace(self, baseline=boundary)
        store._write()
        return store

    def with_volume(self, volume: Volume) -> Store:
        """The same store with one more volume, written durably; its image must be there (`image.add_volume`)."""
        store = replace(self, volumes=(*self.volumes, volume))
        store._write()
        return store

    def with_bytes(self, number: int, size: int) -> Store:
        """The same store with a larger volume, written durably; its image must have that size (`Image.grow`)."""
        volumes = tuple(replace(each, bytes=size) if each.number == number else each for each in self.volumes)
        store = replace(self, volumes=volumes)
        store._write()
        return store

    def mounted(self, name: str, mountpoint: Path, fs: str, since: int) -> Store:
        """The same store, in which a volume holds data of the cluster at that place from write `since` on; durably."""
        extra = {
            **self.extra,
            "mountpoints": {**self.extra["mountpoints"], name: os.fspath(mountpoint)},
            "filesystems": {**self.extra["filesystems"], name: fs},
            "since": {**self.since, name: since},
        }
        store = replace(self, extra=extra)
        store._write()
        return store

    def unmounted(self, name: str) -> Store:
        """The same store, in which a volume holds nothing: what `mounted` noted is taken back, durably."""
        noted = {key: self.extra.get(key, {}) for key in ("mountpoints", "filesystems", "since")}
        without = {key: {each: value for each, value in rows.items() if each != name} for key, rows in noted.items()}
        store = replace(self, extra={**self.extra, **without})
        store._write()
        return store

    def since_at_most(self, write: int) -> Store:
        """The same store, in which no volume came later than with that write, durably: later numbers are given anew."""
        since = {name: min(each, write) for name, each in self.since.items()}
        store = replace(self, extra={**self.extra, "since": since})
        store._write()
        return store

    @property
    def in_use(self) -> tuple[Volume, ...]:
        """The volumes of the set: all but the last one where that was put back, or is on its way (`extending`)."""
        places = self.extra.get("mountpoints")
        return self.volumes if places is None else tuple(each for each in self.volumes if each.name in places)

    @property
    def since(self) -> dict[str, int]:
        """Of volumes that came later: the write from which on each holds data of the cluster."""
        found: dict[str, int] = self.extra.get("since", {})
        return found

    def lock(self) -> FileLock:
        """Lock the store for the one agent that may write to it. PreconditionError if another has it."""
        return FileLock(self.path / "lock", f"the agent of set {self.set_name}")

    def has_agent(self) -> bool:
        """Whether an agent has this store's lock now. Writes nothing."""
        return is_locked(self.path / "lock")

    @property
    def image(self) -> Path:
        """Directory of the backup image."""
        return self.path / "image"

    @property
    def history(self) -> Path:
        """Directory of one JSON file for each verification, restore and event."""
        return self.path / "history"

    @property
    def merged(self) -> Path:
        """Directory of merged increments; it may be missing, and all in it too."""
        return self.path / "merged"

    @property
    def joined(self) -> Path:
        """Directory of the intervals that retention joined; missing as long as there was none."""
        return self.path / "joined"

    @property
    def bases(self) -> Path:
        """Directory of the oldest boundary, when retention let go of what was before it; missing until then."""
        return self.path / "base"

    @property
    def aside(self) -> Path:
        """Directory where retention makes what it publishes, and where it puts what goes: nothing in it counts."""
        return self.path / "expiring"

    def incoming(self, number: int) -> Path:
        """Directory of an interval that is not published yet."""
        return self.path / "incoming" / f"{number:010d}"

    def interval(self, number: int) -> Path:
        """Directory under which an interval is published."""
        return self.path / "intervals" / f"{number:010d}"

    def place(self, span: Span) -> Path:
        """Directory of a published interval, single or joined."""
        return self.interval(span.last) if span.first == span.last else self.joined / span.file_name

    def incoming_numbers(self) -> list[int]:
        """Intervals that are not published yet, in order."""
        return numbers_in(self.path / "incoming")

    def interval_numbers(self) -> list[int]:
        """Published intervals, in order. There are gaps where some were joined."""
        return [span.last for span in self.spans()]

    def newest_number(self) -> int:
        """The newest published interval, 0 when there is none. It is never joined."""
        return max(numbers_in(self.path / "intervals"), default=0)

    def names(self) -> tuple[tuple[str, ...], ...]:
        """What `spans` goes by, as it is called: equal as long as nothing was published, joined or let go of."""
        return tuple(_names(directory) for directory in (self.path / "intervals", self.joined, self.bases))

    def spans(self) -> list[Span]:
        """Published intervals, single and joined, in order; they follow each other from the oldest boundary on.

        What a joined interval covers, and what lies before the oldest boundary, does not count, if it is still there.
        """
        single = numbers_in(self.path / "intervals")  # first: what goes meanwhile, something that is read later covers
        joined = self.joined_spans()
        base = self.base_number()
        joined = [span for span in joined if span.first > base]
        covered = {number for span in joined for number in range(span.first, span.last + 1)}
        plain = [number for number in single if number > base and number not in covered]
        return sorted([*joined, *(Span(number, number) for number in plain)], key=lambda span: span.first)

    def joined_spans(self) -> list[Span]:
        """The joined intervals that count, in order."""
        found: list[Span] = []
        joined = spans_in(self.joined)
        base = self.base_number()
        for span in sorted(joined, key=lambda span: (span.first, -span.last)):
            if span.first > max(base, found[-1].last if found else 0):
                found.append(span)
        return found

    def span_of(self, number: int) -> Span | None:
        """The published interval that ends at boundary `number`; None when it was joined with a later one, or let go.

        It need not exist.
        """
        if number <= self.base_number():
            return None
        for span in self.joined_spans():
            if span.first <= number <= span.last:
                return span if span.last == number else None
        return Span(number, number)

    def base_number(self) -> int:
        """Number of the oldest boundary."""
        try:
            return max(numbers_in(self.bases), default=0)
        except FileNotFoundError:
            return 0


def _names(directory: Path) -> tuple[str, ...]:
    """The entries of a directory; none when it is missing."""
    try:
        return entries(directory)
    except FileNotFoundError:
        return ()


def spans_in(directory: Path) -> set[Span]:
    """What entries of a directory that are called FIRST-LAST span; none when it is missing."""
    found = [re.fullmatch(r"(\d{10})-(\d{10})", name) for name in _names(directory)]
    return {Span(int(match[1]), int(match[2])) for match in found if match}


def numbers_in(directory: Path) -> list[int]:
    """The entries of a directory that are called by a number, in order. FileNotFoundError when it is missing."""
    return sorted(int(name) for name in entries(directory) if len(name) == 10 and name.isascii() and name.isdigit())


def _only_begun(path: Path) -> bool:
    """Whether a directory holds nothing but what `create` makes before store.json: none was ever complete here."""
    files = {name for file in (*wrapped.FILES, "store.json") for name in (file, f".{file}.new")} - {"store.json"}
    return all(
        entry.name in files or (entry.name in DIRECTORIES and entry.is_dir() and not any(entry.iterdir()))
        for entry in path.iterdir()
    )
