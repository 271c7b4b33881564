"""A record of Postgres's csvlog or jsonlog (PostgreSQL 13 to 18): whose transaction wrote it, which statement it tells.

A line may begin with what looks like a record and yet be part of somebody's SQL. In a field of CSV every quote is
doubled, in a string of JSON every quote and line feed is escaped; so what only matches with single quotes around names
is a record. Those of background processes, which have no names, are not told apart in CSV and not needed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from functools import cached_property
from zoneinfo import ZoneInfo

from pgcdp.postgres.statements import is_statement

HEAD_BYTES = 4096
"""More than the part of a record before its message has."""
RECORD_BYTES = 96 << 10
"""So much of a record is read: more than any statement that is shown, less than what `csv` takes as a field."""
STATEMENT_LIMIT = 10_000
"""Characters of a statement that are kept."""
PARAMETERS = " -- "
"""Between a statement and its parameters."""

_CSV_HEAD = re.compile(
    rb'(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [^,"\n]{1,16}),"[^"\n]+","[^"\n]+",\d+,"[^"\n]*",'
    rb'(?P<session>[0-9a-f]+\.[0-9a-f]+),\d+,"[^"\n]*",[^,"\n]*,(?P<vxid>\d+/\d+),(?P<xid>\d+),'
)
_JSON_HEAD = re.compile(
    rb'\{"timestamp":"(?P<time>\d{4}-[^"\n]{10,40})",[^\n]{0,1200}?"session_id":"(?P<session>[0-9a-f]+\.[0-9a-f]+)",'
    rb'[^\n]{0,1200}?"vxid":"(?P<vxid>\d+/\d+)","txid":(?P<xid>\d+),'
)
_CSV_MESSAGE, _CSV_DETAIL, _CSV_CONTEXT, _CSV_QUERY = 13, 14, 18, 19
_CSV_COLUMNS = 23
"""What every version has: newer ones add behind it."""

_SAID = re.compile(r"(?:duration: [\d.]+ ms  )?(?:statement|(?:parse|bind|execute) [^:]*): (.*)", re.S)
_PLAN = re.compile(r"duration: [\d.]+ ms  plan:\n(.*)", re.S)
_BEHIND_QUERY = re.compile(r"\n(?:Query (?:Parameters|Identifier): |\S[^\n]*  \(cost=).*", re.S)
_TRANSLATED = re.compile(r"[^\n]{0,80}?: ")


@dataclass(frozen=True, slots=True)
class Message:
    """The parts of a record that can tell a statement."""

    message: str
    detail: str
    context: str
    query: str


@dataclass(frozen=True)
class Format:
    """One of the two formats: `head` matches where a record begins; `xid` and `vxid` make what is searched for."""

    suffix: str
    head: re.Pattern[bytes]
    xid: bytes
    vxid: bytes
    parse: Callable[[bytes], Message | None]

    @cached_property
    def begin(self) -> re.Pattern[bytes]:
        """Matches a line feed, or a NUL byte (a crash leaves them where a file had grown), and the head behind it."""
        return re.compile(rb"[\n\0]" + self.head.pattern)


def _parse_csv(raw: bytes) -> Message | None:
    """The record that `raw` begins with; None when it is not whole, unless it is longer than what is read."""
    text = raw.decode("utf-8", "replace").replace("\0", "")
    try:
        row = next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
    except csv.Error as error:
        if len(raw) < RECORD_BYTES or "unexpected end" not in str(error):
            return None  # torn off, or being written
        row = next(csv.reader(io.StringIO(text, newline="")), [])
        row += [""] * (_CSV_COLUMNS - len(row))
    if len(row) < _CSV_COLUMNS:
        return None
    return Message(row[_CSV_MESSAGE], row[_CSV_DETAIL], row[_CSV_CONTEXT], row[_CSV_QUERY])


def _parse_json(raw: bytes) -> Message | None:
    line, end, _ = raw.partition(b"\n")
    try:
        row = json.loads(line) if end else None
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return Message(*(str(row.get(key, "")) for key in ("message", "detail", "context", "statement")))


CSVLOG = Format(".csv", _CSV_HEAD, b",%d,", b",%s,", _parse_csv)
JSONLOG = Format(".json", _JSON_HEAD, b'"txid":%d,', b'"vxid":"%s"', _parse_json)


def statement_of(said: Message) -> str | None:
    """The statement that a record tells, with its parameters; None when it tells none."""
    text = said.query or (None if said.context else _in_message(said.message))
    if not text or not text.strip():
        return None
    if said.detail and not said.query and "$1 = " in said.detail:
        text = f"{text.strip()}{PARAMETERS}{said.detail}"
    text = text.strip()
    return text if len(text) <= STATEMENT_LIMIT else f"{text[: STATEMENT_LIMIT - 1]}…"


def _in_message(message: str) -> str | None:
    match = _SAID.fullmatch(message)
    if match is not None:
        return match[1]
    match = _PLAN.fullmatch(message)
    if match is not None:
        return _in_plan(match[1])
    at = 0
    for _ in range(3):  # in another language than English
        match = _TRANSLATED.match(message, at)
        if match is None:
            return None
        at = match.end()
        if is_statement(message[at:]):
            return message[at:]
    return None


def _in_plan(plan: str) -> str | None:
    """The statement in a message of auto_explain, in its formats text and json."""
    if plan.startswith("Query Text: "):
        return _BEHIND_QUERY.sub("", plan.removeprefix("Query Text: "))
    try:
        told = json.loads(plan)
    except ValueError:
        return None
    return str(told.get("Query Text", "")) if isinstance(told, dict) else None


def time_of(raw: bytes, zone: ZoneInfo | None) -> int | None:
    """Nanoseconds since 1970 of a record's time ("2026-11-25 04:17:23.907 CET"); None when its zone is not known."""
    clock, _, abbreviation = raw.decode("ascii", "replace").rpartition(" ")
    try:
        local = datetime.fromisoformat(clock)
        if abbreviation in ("UTC", "GMT"):
            return _since_1970(local, UTC)
        if zone is None:
            return _since_1970(datetime.fromisoformat(f"{clock}{abbreviation}"), None)
    except ValueError:
        return None
    told = [local.replace(tzinfo=zone, fold=fold) for fold in (0, 1)]
    return _since_1970(next((each for each in told if each.tzname() == abbreviation), told[0]), None)


def _since_1970(moment: datetime, zone: tzinfo | None) -> int:
    known = moment if zone is None else moment.replace(tzinfo=zone)
    return round(known.timestamp() * 1000) * 1_000_000
