"""The use case of marks: setting one, and keeping its point from retention. As in `pgcdp.api`, as docs/json.md says."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from pgcdp.capture.control import EngineClient
from pgcdp.config import load_config
from pgcdp.errors import PgcdpError, TargetError
from pgcdp.looking import marks
from pgcdp.opening import open_source
from pgcdp.records import Target
from pgcdp.store.catalog import Catalog
from pgcdp.store.kept import keep_event, kept_marks
from pgcdp.store.layout import Store

Json = dict[str, Any]


def mark(set_name: str, name: str, keep: bool = False) -> Json:
    """Put a named mark into the write order; with `keep` retention never lets go of it.

    Where there is one of that name, `keep` is said of the newest one, and none is set. Raises TargetError when its
    point was let go of.
    """
    config = load_config(set_name)
    client = EngineClient(config.paths.control)
    if keep:
        earlier = _writes_of(set_name, name)
        if earlier:
            _keep_existing(set_name, name, earlier[0])
            return _told(set_name, name, earlier[0], earlier[1:], kept=True, existed=True)
    else:
        earlier = []
        with suppress(PgcdpError, OSError):  # the mark itself needs no store
            earlier = _writes_of(set_name, name)
    store = Store.open(config.store, config.set_id_bytes) if keep else None  # it must be there before the mark is
    write = client.mark(name)
    if store is not None:
        _say_of_mark(store, name, write, keep=True)
    return _told(set_name, name, write, earlier, kept=keep, existed=False)


def unkeep(set_name: str, name: str) -> Json:
    """Retention may let go of the marks of a name. Raises TargetError when none is kept."""
    config = load_config(set_name)
    store = Store.open(config.store, config.set_id_bytes)
    kept = kept_marks(store)
    found = [each for each in kept if each.name == name]
    if not found:
        names = ", ".join(dict.fromkeys(each.name for each in kept)) or "none"
        raise TargetError(f'no mark "{name}" is kept', f"kept are: {names}")
    for each in found:
        _say_of_mark(store, name, each.write, keep=False)
    writes = [each.write for each in found]
    return _told(set_name, name, writes[-1], writes[:-1], kept=False, existed=True)


def _writes_of(set_name: str, name: str) -> list[int]:
    """Where there are marks and restore points of a name, the newest first."""
    return [each["write"] for each in marks(open_source(set_name, None)) if each["name"] == name]


def _keep_existing(set_name: str, name: str, write: int) -> None:
    source = open_source(set_name, None)
    with source.held():  # retention lets go of nothing meanwhile; behind it, it knows
        source.resolve(Target("name", name=name))
        if write not in {each.write for each in kept_marks(source.store) if each.name == name}:
            _say_of_mark(source.store, name, write, keep=True)


def _told(set_name: str, name: str, write: int, earlier: list[int], *, kept: bool, existed: bool) -> Json:
    return {"set": set_name, "name": name, "write": write, "earlier": earlier, "kept": kept, "existed": existed}


def _say_of_mark(store: Store, name: str, write: int, keep: bool) -> None:
    catalog = Catalog.open(store)
    try:
        catalog.remember("event", time.time_ns(), keep_event(name, write, keep))
    finally:
        catalog.close()
