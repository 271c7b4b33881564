"""Pure: the points that have a name: marks and restore points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgcdp.errors import TargetError
from pgcdp.records import COMMITTED, COMMITTED_PREPARED
from pgcdp.recovery.commits import CANDIDATES, History, find_xid
from pgcdp.recovery.instant import Instant, just_before, just_behind


@dataclass
class _Named:
    """What bears a name."""

    write: int
    event: Mapping[str, Any]
    end: np.void | None = None


def at_name(name: str, exclusive: bool, history: History) -> Instant:
    """The newest mark or restore point of that name."""
    found = [each for each in marks(history) if each.event["name"] == name]
    if not found:
        hint = _names_hint(history)
        if history.doubtful:
            hint = f"{history.not_indexed(history.doubtful)}: it may be there; {hint}"
        raise TargetError(f'no mark or restore point "{name}" in what can be restored', hint)
    named = found[0]
    note = f'{len(found)} marks are called "{name}"; this is the newest one' if len(found) > 1 else None
    if history.doubtful:
        unseen = history.not_indexed(history.doubtful)
        note = f"{note or 'another mark of that name may exist'}: {unseen}"
    if named.event["lsn"] is None:
        return Instant(named.write - (1 if exclusive else 0), note=note)
    record = named.event if named.end is None else named.end
    return just_before(record, note) if exclusive else just_behind(record, note)


def marks(history: History) -> list[_Named]:
    """Marks and restore points, newest first. One in a transaction counts when that commits, where it does."""
    found = []
    for number in history.numbers:
        said = history.summary(number)
        if said is not None and not said.get("marks", 1):
            continue
        commits = history.commits(number)
        for event in commits.events:
            if event["kind"] not in ("mark", "restore_point"):
                continue
            if not event.get("xid"):
                found.append(_Named(int(event["write"]), event))
                continue
            ended = find_xid(int(event["xid"]), history, event["write"])
            if ended is not None and ended[1]["status"] in (COMMITTED, COMMITTED_PREPARED):
                found.append(_Named(int(ended[1]["write"]), event, ended[1]))
    return sorted(found, key=lambda each: (each.write, each.event["lsn"] or 0), reverse=True)


def _names_hint(history: History) -> str:
    names = list(dict.fromkeys(each.event["name"] for each in marks(history)))[:CANDIDATES]
    return f"there are: {', '.join(names)}" if names else "no mark was set; pgcdp mark NAME sets one"
