"""Rewinds in place as the writes themselves tell of them: by their begin and end records (FORMAT.md 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import DamageError, UsageError
from pgcdp.fsio import read_json, write_json
from pgcdp.records import REWIND_BEGIN, REWIND_END, Kind, Rewind
from pgcdp.store.layout import Store
from pgcdp.units import format_lsn, parse_lsn

KEPT = "rewinds.json"
"""In a store: the rewinds of all its intervals once more. One that is lost would else hide what the branches are."""
Said = tuple[int, int, str]
"""A begin or end record: flags, write number, name."""


def point_name(write: int, lsn: int | None) -> str:
    """The name that both records of a rewind to this point bear."""
    return str(write) if lsn is None else f"{write} {format_lsn(lsn)}"


def rewind_records(records: NDArray[np.void]) -> NDArray[np.intp]:
    """Rows of begin and end records in an array RECORD or INDEX."""
    return np.flatnonzero((records["kind"] == Kind.MARK) & np.isin(records["flags"], (REWIND_BEGIN, REWIND_END)))


def said_in(records: NDArray[np.void], data_of: Callable[[int], bytes]) -> list[Said]:
    """The begin and end records of an array RECORD or INDEX; `data_of(row)` is the data of a record."""
    rows = rewind_records(records).tolist()
    return [(int(records["flags"][row]), int(records["number"][row]), data_of(row).decode()) for row in rows]


def pair(said: Iterable[Said]) -> list[Rewind]:
    """Rewinds in order. One that was killed may have begun several times; the last one may not have ended.

    Raises DamageError for records that cannot be.
    """
    found: list[Rewind] = []
    begun: int | None = None
    for flags, write, name in said:
        try:
            point, _, lsn = name.partition(" ")
            to_write, to_lsn = int(point), parse_lsn(lsn) if lsn else None
        except (ValueError, UsageError):
            raise DamageError(f'write {write} is a record of a rewind, but names no recovery point: "{name}"') from None
        if flags == REWIND_BEGIN:
            if begun is None:
                begun = write
                found.append(Rewind(write, None, to_write, to_lsn))
            else:
                found[-1] = Rewind(begun, None, to_write, to_lsn)
        elif flags == REWIND_END and begun is not None:
            found[-1] = Rewind(begun, write, to_write, to_lsn)
            begun = None
        else:
            raise DamageError(f"write {write} ends a rewind that has no begin record")
    return found


def keep(store: Store, rewinds: Sequence[Rewind]) -> None:
    """Write down rewinds of a published interval beside the intervals, durably. Harmless when done twice."""
    if not rewinds:
        return
    try:
        known = {each.begin: each for each in kept(store)}
    except DamageError:  # what is left of it helps nobody; what the intervals say holds
        known = {}
    if any(known.get(each.begin) != each for each in rewinds):
        known |= {each.begin: each for each in rewinds}
        write_json(store.path / KEPT, {"rewinds": [asdict(known[begin]) for begin in sorted(known)]})


def kept(store: Store) -> list[Rewind]:
    """What `keep` wrote, in order. Raises DamageError."""
    path = store.path / KEPT
    try:
        return [Rewind(**each) for each in read_json(path)["rewinds"]]
    except FileNotFoundError:
        return []
    except (KeyError, TypeError):
        raise DamageError(f"{path} does not tell of rewinds (offset 0)") from None
