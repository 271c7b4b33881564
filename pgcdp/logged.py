"""What the server's own log tells of transactions that are about to be shown: the statements that they ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgcdp.errors import DamageError, PreconditionError
from pgcdp.postgres.logline import STATEMENT_LIMIT
from pgcdp.postgres.serverlog import Ended, LogPlace, logs_statements, read_statements
from pgcdp.postgres.statements import Deed, telling
from pgcdp.recovery.source import Source
from pgcdp.units import parse_time

Json = dict[str, Any]
NAMED = 5
"""How many transactions a note names."""


def add_statements(source: Source, told: list[Json], asked: Sequence[Deed] = ()) -> str | None:
    """Set "statement" of each transaction, as far as the log of the source's live cluster tells it; None otherwise.

    With `asked`, the statements that did one of these deeds; else the last one that changed a table. Returns what must
    be known of what is missing, or None.
    """
    if source.pgdata is None or not told:
        return None
    try:
        settings = source.newest_settings()
        if not settings:
            return "the agent has not asked the cluster for its settings yet: statements from its log are not shown"
        place = LogPlace.of(source.pgdata, settings)
    except (DamageError, PreconditionError):  # what is shown is right without it
        return None
    if place is None:
        return None
    since = _Since(source)
    found = read_statements(
        place, [Ended(each["xid"], since.of(each["xid"]), parse_time(each["time"])) for each in told]
    )
    for each, texts in zip(told, found.texts, strict=True):
        statements = telling(texts, asked)
        text = ";\n".join(statements if asked else statements[-1:])
        each["statement"] = text[:STATEMENT_LIMIT] or None
    nameless = [each["xid"] for each, texts in zip(told, found.texts, strict=True) if not texts]
    if found.note is None and asked and nameless and logs_statements(settings):
        return _no_record(nameless)
    return found.note


def _no_record(xids: Sequence[int]) -> str:
    named = ", ".join(map(str, xids[:NAMED])) + (f" and {len(xids) - NAMED} more" if len(xids) > NAMED else "")
    return (
        f"the server's log has no record with the id of transaction {named}, so that it does not tell what they ran: "
        "log_min_duration_statement = 0 makes it do so for most"
    )


class _Since:
    """Before when a transaction had no id, by the ids that boundaries name."""

    def __init__(self, source: Source) -> None:
        self._begin_ns = source.base().time_ns
        self._intervals = source.intervals()

    def of(self, xid: int) -> int:
        """Nanoseconds since 1970. A checkpoint knows the next id of when it began, after the boundary before."""
        known = [each.from_time_ns for each in self._intervals if each.boundary.next_xid <= xid]
        return max(known, default=self._begin_ns)
