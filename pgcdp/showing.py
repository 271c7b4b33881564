"""The use case of `pgcdp show`: one captured write, and what it holds. As in `pgcdp.api`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from pgcdp import doctor, transactions
from pgcdp.capture import volumes
from pgcdp.capture.filemap import FileMapper, places_of
from pgcdp.config import load_config
from pgcdp.errors import DamageError, TargetError
from pgcdp.opening import open_source
from pgcdp.records import GAP_BEGIN, GAP_END, REWIND_BEGIN, Kind, Target
from pgcdp.recovery.holds import kind_of, owners_in, owners_now
from pgcdp.recovery.source import Source
from pgcdp.recovery.target import window
from pgcdp.units import format_time

Json = dict[str, Any]

FILES_SECONDS = 30.0
"""How long `show` waits for the filesystem to say whose the blocks of a write are that is in no interval yet."""


def show(set_name: str, write: int) -> Json:
    """One captured write."""
    return show_in(set_name, open_source(set_name, None), write)


def show_in(set_name: str | None, source: Source, write: int) -> Json:
    """The same, of a source that is open."""
    point = source.place(Target("write", write))
    try:
        record = source.record(write)
    except DamageError:
        if write != window(source.listing())[0].write:
            raise
        raise TargetError(
            f"write {write} is where the recovery window begins: what it held is in the image, not kept by itself",
            f"pgcdp show {source.store.set_name} {write + 1} shows the next one",
        ) from None
    kind = Kind(int(record["kind"]))
    names = {volume.number: volume.name for volume in source.store.volumes}
    holds: Json = {}
    if kind == Kind.MARK:
        holds = {"mark": _name_of(source, write, point.interval)}
        if record["flags"]:
            holds = _between_json(int(record["flags"]), holds["mark"])
    elif kind == Kind.WRITE:
        holds = _holds(set_name, source, record, point.interval)
    return {
        "write": write,
        "time": format_time(int(record["wall_ns"])),
        "volume": names.get(int(record["volume"])),
        "kind": kind.name.lower(),
        "offset": int(record["offset"]),
        "length": int(record["length"]),
        "interval": point.interval,
        "holds": {"what": kind_of(holds), **holds},
    }


def _between_json(flags: int, name: str | None) -> Json:
    """What the begin or end record of a rewind or gap tells."""
    what = "begin" if flags in (REWIND_BEGIN, GAP_BEGIN) else "end"
    if flags in (GAP_BEGIN, GAP_END):
        return {"gap": what, "reason": (name or "").partition(" ")[0]}
    return {"rewind": what, "to": name}


def _name_of(source: Source, write: int, interval: int | None) -> str | None:
    """The name of a mark, or the point of a rewind's begin or end record; None when it was not written down."""
    try:
        return source.data(write).decode("utf-8", "replace")
    except TargetError:
        return transactions.mark_in(source, write, interval)


def _holds(set_name: str | None, source: Source, record: np.void, interval: int | None) -> Json:
    """What was recognised in the data of a write, and whose its blocks are."""
    write = int(record["number"])
    data = b""
    with suppress(TargetError):  # retention let go of it: what was written down of it is told all the same
        data = source.data(write)
    holds = doctor.describe_data(data) or transactions.wal_in(source, write, interval)
    if interval is not None:
        return {**holds, "files": owners_in(source.store, interval, record)}
    if set_name is None:
        return {**holds, "files": []}
    config = load_config(set_name)
    places = places_of(config.pgdata, {n: each.mountpoint for n, each in enumerate(config.volumes)})
    files = None
    if all(volumes.mount_at(place.mountpoint) is not None for place in places):
        files = FileMapper(places).soon(FILES_SECONDS, 1.0)
    last = max(source.store.interval_numbers(), default=0)
    return {**holds, "files": owners_now(source.store, files, last + 1, record) if files is not None else []}
