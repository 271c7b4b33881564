"""History below the store: one JSON file for each verification, restore and event; the catalog only mirrors them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, get_args

from pgcdp.errors import BugError, DamageError
from pgcdp.fsio import read_json, write_json
from pgcdp.store.layout import Store

HistoryKind = Literal["verification", "restore", "event"]
KINDS: tuple[str, ...] = get_args(HistoryKind)
_NAME = re.compile(rf"(\d{{20}})-(\d{{4}})-({'|'.join(KINDS)})\.json")


def add_history(store: Store, kind: HistoryKind, time_ns: int, content: dict[str, Any]) -> str:
    """Write one entry, durably; returns its file name. `content` must be JSON without a key `checksum`.

    Several entries of one time get a number each. One process at a time may write (the store's lock).
    """
    if kind not in KINDS or "checksum" in content:
        raise BugError(f"{kind} is no history entry, or it holds a checksum")
    for attempt in range(10000):
        name = f"{time_ns:020d}-{attempt:04d}-{kind}.json"
        if not (store.history / name).exists():
            write_json(store.history / name, {"kind": kind, "time_ns": time_ns, "content": content})
            return name
    raise BugError(f"{store.history} holds 10000 entries of time {time_ns}")


def history_names(store: Store) -> list[str]:
    """File names of all entries, oldest first."""
    return sorted(name for name in os.listdir(store.history) if _NAME.fullmatch(name))


def read_history(store: Store, name: str) -> tuple[str, int, dict[str, Any]]:
    """Kind, time and content of an entry. Raises DamageError naming the file."""
    return read_entry(store.history / name)


def read_entry(file: Path) -> tuple[str, int, dict[str, Any]]:
    """The same of a file."""
    entry = read_json(file)
    try:
        return str(entry["kind"]), int(entry["time_ns"]), dict(entry["content"])
    except (KeyError, TypeError, ValueError):
        raise DamageError(f"{file} is no history entry (offset 0)") from None
