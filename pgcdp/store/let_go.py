"""What the history says of what retention let go of: written before anything goes.

A command's run is one event. The agent lets go of a little after each boundary; what it does on one day (UTC) is one
event that grows, so that after years the history is not made of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pgcdp.errors import DamageError
from pgcdp.fsio import write_json
from pgcdp.records import Span
from pgcdp.store.history import add_history, read_history
from pgcdp.store.layout import Store
from pgcdp.store.retention import DAY_NS, Plan

EXPIRE = "expire"
"""The event: {"event", "by", "base", "joined", "thinned"}; both lists are of [first, last]."""
AGENT = "agent"


def say_let_go(store: Store, time_ns: int, by: str, found: Plan) -> tuple[str, int, dict[str, Any]]:
    """Write down what is about to go, durably; returns the entry's name, time and content. Raises OSError."""
    content: dict[str, Any] = {
        "event": EXPIRE,
        "by": by,
        "base": found.base,
        "joined": [[span.first, span.last] for span in sorted(found.joins)],
        "thinned": runs_of(found.thin),
    }
    if by != AGENT:
        return add_history(store, "event", time_ns, content), time_ns, content
    day = time_ns // DAY_NS * DAY_NS
    name = f"{day:020d}-0000-event.json"
    try:
        before = read_history(store, name)[2]
    except FileNotFoundError:
        before = {}
    except DamageError:  # it stays for whoever checks
        return add_history(store, "event", time_ns, content), time_ns, content
    if before.get("event") == EXPIRE:
        content = _both(before, content)
    elif before:
        return add_history(store, "event", time_ns, content), time_ns, content
    write_json(store.history / name, {"kind": "event", "time_ns": day, "content": content})
    return name, day, content


def runs_of(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers as [first, last] of those that follow each other."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def _both(before: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    bases = [each["base"] for each in (before, more) if each["base"] is not None]
    thinned = [n for each in (before, more) for first, last in each["thinned"] for n in range(first, last + 1)]
    joined = {Span(*pair) for each in (before, more) for pair in each["joined"]}
    return {
        **more,
        "base": max(bases, default=None),
        "joined": [[span.first, span.last] for span in sorted(joined)],
        "thinned": runs_of(thinned),
    }
