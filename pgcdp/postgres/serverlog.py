"""The statements of transactions, out of Postgres's own log: csvlog or jsonlog, as far as it tells whose they are.

A record bears the id of its transaction only from when the transaction has one. Records of the same session and the
same virtual transaction id are of the same transaction: so one record with the id is enough for all of them. Where
there is none, as with a lone statement that was logged before it began and not again before it ended, nothing in
the log says whose it was, and nothing is shown.

Logs are large. Each transaction has its share of READ_BYTES; places are found by time, by bisection, in the files that
were written to since. Files grow, rotate and vanish meanwhile, and a crash leaves torn records and NUL bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from pgcdp.postgres.logline import CSVLOG, HEAD_BYTES, JSONLOG, PARAMETERS, RECORD_BYTES, Format, statement_of, time_of
from pgcdp.units import format_time

READ_BYTES = 128 << 20
"""How much of the log is read at most for all transactions together; each has LEAST_BYTES, however many they are."""
LEAST_BYTES = 1 << 20
BEFORE_NS = 600 * 10**9
"""So long a statement may have been logged before its transaction got its id."""
BEHIND_NS = 10**9
"""Records may be so much out of order."""
_PIECE = 4 << 20
_PROBE = 64 << 10
_PROBE_LIMIT = 16 << 20


@dataclass(frozen=True, slots=True)
class Ended:
    """A transaction: `since_ns` before it got its id, `until_ns` when it ended (ns since 1970)."""

    xid: int
    since_ns: int
    until_ns: int


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where a cluster logs with transaction ids."""

    directory: Path
    format: Format
    zone: ZoneInfo | None

    @classmethod
    def of(cls, pgdata: Path, settings: Mapping[str, Any]) -> LogPlace | None:
        """By its data directory and `session.settings`; None when it logs neither csvlog nor jsonlog."""
        values = {row["name"]: str(row["setting"]) for row in settings.get("settings", ())}
        destinations = {word.strip().lower() for word in values.get("log_destination", "stderr").split(",")}
        wanted = [found for name, found in (("csvlog", CSVLOG), ("jsonlog", JSONLOG)) if name in destinations]
        if not wanted or values.get("logging_collector", "off") != "on":
            return None
        try:
            zone = ZoneInfo(values.get("log_timezone", "GMT"))
        except (KeyError, ValueError, OSError):
            zone = None
        return cls(pgdata / values.get("log_directory", "log"), wanted[0], zone)


def logs_statements(settings: Mapping[str, Any]) -> bool:
    """Whether a cluster logs statements at all, by `session.settings`."""
    values = {row["name"]: str(row["setting"]) for row in settings.get("settings", ())}
    return values.get("log_statement", "none") != "none" or values.get("log_min_duration_statement", "-1") != "-1"


@dataclass(frozen=True, slots=True)
class Statements:
    """Statements of each transaction asked for, in the order that they ran; `note` when not all could be read."""

    texts: list[list[str]]
    note: str | None = None


def read_statements(place: LogPlace, ended: Sequence[Ended], limit: int = READ_BYTES) -> Statements:
    """What the log tells of transactions, reading at most `limit` bytes. Never fails: `note` says what is missing."""
    if not ended:
        return Statements([])
    share = max(LEAST_BYTES, limit // len(ended))
    with ExitStack() as stack:
        try:
            files = _open(place, stack)
            found = [_Search(place, files, each, share).run() for each in ended]
        except OSError as error:
            return Statements(
                [[] for _ in ended], f"the server's log cannot be read: {place.directory}: {error.strerror}"
            )
    note = None
    if any(file.timeless for file in files):
        note = f"the times in the server's log in {place.directory} are not understood: nothing is shown from it"
    cut_off = [since for texts, since in found if not texts and since]
    if cut_off:
        note = f"of the server's log only what is behind {format_time(min(cut_off))} was read: there is too much of it"
    return Statements([texts for texts, _ in found], note)


@dataclass
class _File:
    """An open log file of `size` bytes."""

    fd: int
    written_ns: int
    size: int
    place: LogPlace
    timeless: bool = False
    times: dict[int, tuple[int, int] | None] = field(default_factory=dict)

    def next_time(self, at: int) -> tuple[int, int] | None:
        """(offset, ns) of the first record at or behind an offset, not further away than can be read."""
        if at not in self.times:
            self.times[at] = self._next_time(at)
        return self.times[at]

    def _next_time(self, at: int) -> tuple[int, int] | None:
        base, size = max(0, at - 1), _PROBE
        while True:
            data = os.pread(self.fd, size, base)
            match = self.place.format.begin.search(b"\n" + data if at == 0 else data)
            if match is not None:
                time_ns = time_of(match["time"], self.place.zone)
                self.timeless |= time_ns is None
                return None if time_ns is None else (at + match.start(), time_ns)
            if len(data) < size or size >= _PROBE_LIMIT:
                return None
            size *= 4

    def position(self, time_ns: int) -> int:
        """Where the records of a time begin."""
        low, high = 0, self.size
        while high - low > _PROBE:
            middle = (low + high) // 2
            told = self.next_time(middle)
            if told is None or told[0] >= high or told[1] >= time_ns:
                high = middle
            else:
                low = told[0]
        return low


def _open(place: LogPlace, stack: ExitStack) -> list[_File]:
    """The log's files, oldest first. Raises OSError when the directory cannot be read."""
    files = []
    for entry in os.scandir(place.directory):
        if not entry.name.endswith(place.format.suffix):
            continue
        with suppress(OSError):  # removed meanwhile
            if entry.is_file():
                fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                stack.callback(os.close, fd)
                said = os.fstat(fd)
                files.append(_File(fd, said.st_mtime_ns, said.st_size, place))
    return sorted(files, key=lambda file: file.written_ns)


@dataclass
class _Search:
    """The search for one transaction's statements in at most `limit` bytes."""

    place: LogPlace
    files: Sequence[_File]
    ended: Ended
    limit: int

    def run(self) -> tuple[list[str], int]:
        """Its statements, and where the part that was read begins when that is not all (ns since 1970, else 0)."""
        ranges, cut_off = self._ranges()
        low = self.ended.xid & 0xFFFFFFFF
        own = [
            (match["session"], match["vxid"])
            for _, _, match in self._records(ranges, self.place.format.xid % low)
            if int(match["xid"]) == low
        ]
        if not own:
            return [], cut_off
        session, vxid = own[-1]  # an xid of another branch came earlier
        texts: list[str] = []
        for file, at, match in self._records(ranges, self.place.format.vxid % vxid):
            if (match["session"], match["vxid"]) != (session, vxid) or int(match["xid"]) not in (0, low):
                continue
            said = self.place.format.parse(os.pread(file.fd, RECORD_BYTES, at))
            text = statement_of(said) if said is not None else None
            if text is not None:
                _add(texts, text)
        return texts, cut_off

    def _ranges(self) -> tuple[list[tuple[_File, int, int]], int]:
        """Parts of the files that may tell of it, oldest first; nearest to its end when there are too many bytes."""
        since, until = self.ended.since_ns - BEFORE_NS, self.ended.until_ns + BEHIND_NS
        found: list[tuple[_File, int, int]] = []
        left = self.limit
        for file in reversed(self.files):
            first = file.next_time(0)
            if file.written_ns < since or first is None or first[1] > until:
                continue
            begin, end = file.position(since), min(file.size, file.position(until) + 2 * _PROBE)
            kept = max(begin, end - left)
            left -= end - kept
            if end > kept:
                found.append((file, kept, end))
            if kept > begin:
                told = file.next_time(kept)
                return found[::-1], told[1] if told is not None else until
        return found[::-1], 0

    def _records(self, ranges: Sequence[tuple[_File, int, int]], needle: bytes) -> Iterator[tuple[_File, int, Any]]:
        """(file, offset, match of its head) of the records with `needle` in their heads, of the right times."""
        since, until = self.ended.since_ns - BEFORE_NS, self.ended.until_ns + BEHIND_NS
        for file, begin, end in ranges:
            for at, match in _heads(file, begin, end, needle):
                time_ns = time_of(match["time"], self.place.zone)
                if time_ns is not None and since <= time_ns <= until:
                    yield file, at, match


def _add(texts: list[str], text: str) -> None:
    """Several records tell of one statement: its parsing, binding and plan, with or without its parameters."""
    for at in range(max(0, len(texts) - 3), len(texts)):
        if texts[at] == text or texts[at].startswith(f"{text}{PARAMETERS}"):
            return
        if text.startswith(f"{texts[at]}{PARAMETERS}"):
            texts[at] = text
            return
    texts.append(text)


def _heads(file: _File, begin: int, end: int, needle: bytes) -> Iterator[tuple[int, Any]]:
    for piece in range(begin, end, _PIECE):
        base = max(0, piece - HEAD_BYTES)
        stop = min(end, piece + _PIECE)
        data = os.pread(file.fd, stop + HEAD_BYTES - base, base)
        at = data.find(needle, piece - base)
        while 0 <= at < stop - base:
            line = 1 + max(data.rfind(b"\n", 0, at), data.rfind(b"\0", 0, at))
            match = file.place.format.head.match(data, line) if line or not base else None
            if match is not None and at < match.end():
                yield base + line, match
            at = data.find(needle, at + 1)
