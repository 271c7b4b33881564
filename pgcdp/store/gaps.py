"""Gaps as the writes themselves tell of them: by their begin and end records (FORMAT.md 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import DamageError
from pgcdp.fsio import read_json, write_json
from pgcdp.records import BLOCK, GAP_BEGIN, GAP_END, GAP_REASONS, Gap, Kind
from pgcdp.store.layout import Store

MARKER = "gaps.json"
"""In a store whose writes may have gap records: without it nobody looks for them behind the last boundary. It has the
gaps of all intervals once more: one that is lost would else hide from when to when nothing is known."""


def announce(store: Store, behind: int) -> None:
    """Have readers look for gap records behind write `behind`, durably. To be done before the first one is made."""
    if not (store.path / MARKER).exists():
        write_json(store.path / MARKER, {"behind": behind})


def may_have_gaps(store: Store) -> bool:
    """Whether writes of this store may have gap records."""
    return (store.path / MARKER).exists()


def keep(store: Store, gaps: Sequence[Gap]) -> None:
    """Write down gaps of a published interval beside the intervals, durably. Harmless when done twice."""
    if not gaps:
        return
    try:
        content = _content(store)
        known = {each.begin: each for each in _gaps_in(store, content)}
    except DamageError:  # what is left of it helps nobody; what the intervals say holds
        content, known = {}, {}
    if any(known.get(each.begin) != each for each in gaps):
        known |= {each.begin: each for each in gaps}
        told = {"behind": content.get("behind", 0), "gaps": [asdict(known[begin]) for begin in sorted(known)]}
        write_json(store.path / MARKER, told)


def kept(store: Store) -> list[Gap]:
    """What `keep` wrote, in order. Raises DamageError."""
    return _gaps_in(store, _content(store))


def _content(store: Store) -> dict[str, Any]:
    try:
        return read_json(store.path / MARKER)
    except FileNotFoundError:
        return {}


def _gaps_in(store: Store, content: dict[str, Any]) -> list[Gap]:
    try:
        return [Gap(**each) for each in content.get("gaps", ())]
    except TypeError:
        raise DamageError(f"{store.path / MARKER} does not tell of gaps (offset 0)") from None


def gap_name(reason: str, since_ns: int) -> str:
    """The name that both records of a gap bear."""
    return f"{reason} {since_ns}"


def gap_records(records: NDArray[np.void]) -> NDArray[np.intp]:
    """Rows of begin and end records in an array RECORD or INDEX."""
    return np.flatnonzero((records["kind"] == Kind.MARK) & np.isin(records["flags"], (GAP_BEGIN, GAP_END)))


class GapFinder:
    """Finds gaps in writes that are given to it in order and without holes; `found` may end with one that goes on.

    One whose healing was killed may have begun several times.
    """

    def __init__(self) -> None:
        self.found: list[Gap] = []

    def take(self, records: NDArray[np.void], data_of: Callable[[int], bytes]) -> None:
        """An array RECORD or INDEX; `data_of(row)` is the data of a record. Raises DamageError for what cannot be."""
        begin = 0
        for row in gap_records(records).tolist():
            self._count(records[begin:row])
            self._say(records[row], data_of(row).decode("utf-8", "replace"))
            begin = row
        self._count(records[begin:])

    def _open(self) -> bool:
        return bool(self.found) and self.found[-1].end is None

    def _count(self, records: NDArray[np.void]) -> None:
        if self._open():
            blocks = self.found[-1].blocks + int(records["length"].sum()) // BLOCK
            self.found[-1] = replace(self.found[-1], blocks=blocks)

    def _say(self, record: np.void, name: str) -> None:
        write = int(record["number"])
        reason, _, since = name.partition(" ")
        if reason not in GAP_REASONS or not since.isdecimal():
            raise DamageError(f'write {write} is a record of a gap, but does not tell of one: "{name}"')
        if record["flags"] == GAP_BEGIN:
            if not self._open():
                self.found.append(Gap(write, None, reason, int(since), None, 0))
        elif self._open():
            self.found[-1] = replace(self.found[-1], end=write, to_ns=int(record["wall_ns"]))
        else:
            raise DamageError(f"write {write} ends a gap that has no begin record")
