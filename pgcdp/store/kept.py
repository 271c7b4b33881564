"""Points that retention must not let go of: marks that were kept, and the newest boundary that was verified.

Both are in the history, so that they outlive the catalog.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pgcdp.store.history import HistoryKind, history_names, read_entry
from pgcdp.store.layout import Store

KEEP, UNKEEP = "keep", "unkeep"
"""What an event of the history says of a mark: {"event", "name", "write"}."""


@dataclass(frozen=True, slots=True, order=True)
class Kept:
    """A mark that is kept."""

    write: int
    name: str


def keep_event(name: str, write: int, keep: bool) -> dict[str, Any]:
    """What the history says of a mark from now on."""
    return {"event": KEEP if keep else UNKEEP, "name": name, "write": write}


def kept_marks(store: Store) -> list[Kept]:
    """The marks that are kept, in order. Raises DamageError when what may say so is damaged."""
    found: set[Kept] = set()
    for content in _entries(store, "event"):
        if content.get("event") == KEEP:
            found.add(Kept(int(content["write"]), str(content["name"])))
        elif content.get("event") == UNKEEP:
            found.discard(Kept(int(content["write"]), str(content["name"])))
    return sorted(found)


def verified_boundaries(store: Store) -> set[int]:
    """The boundaries whose newest verification was right. Raises DamageError when what may say so is damaged."""
    return {number for number, right in _verdicts(store).items() if right}


def wrong_boundaries(store: Store) -> list[int]:
    """Those that are there, and whose newest verification was not right. Raises as `verified_boundaries`."""
    there = set(store.interval_numbers())
    return sorted(number for number, right in _verdicts(store).items() if not right and number in there)


def _verdicts(store: Store) -> dict[int, bool]:
    """Whether the newest verification of each boundary was right."""
    ok: dict[int, bool] = {}
    for content in _entries(store, "verification"):
        point = content.get("recovery_point") or {}
        if point.get("boundary") is not None and point.get("lsn") is None:
            ok[int(point["boundary"])] = bool(content.get("ok"))
    return ok


def _entries(store: Store, kind: HistoryKind) -> list[dict[str, Any]]:
    return [_entry(store.history / name) for name in history_names(store) if name.endswith(f"-{kind}.json")]


@lru_cache(maxsize=1 << 16)
def _entry(file: Path) -> dict[str, Any]:
    """An entry never changes once it is there; the agent asks for all of them again and again."""
    return read_entry(file)[2]
