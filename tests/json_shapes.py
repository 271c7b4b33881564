"""The shapes of docs/json.md: the keys that must be there, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
LSN = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")
Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Maybe:
    """A value of that shape, or null."""

    shape: Any


POINT: Shape = {"write": int, "lsn": Maybe(LSN), "interval": Maybe(int), "boundary": Maybe(int), "time": TIME,
                "note": Maybe(str)}  # fmt: skip
WINDOW: Shape = {"from_time": TIME, "to_time": TIME, "from_write": int, "to_write": int}
CHECK: Shape = {"name": str, "ok": bool, "seconds": float, "detail": str}
OUTSIDE: Shape = {"name": str, "place": str}
RUNS = [{"first": int, "last": int}]
EXPIRED: Shape = {"time": TIME, "by": str, "oldest": Maybe(int), "joined": RUNS, "thinned": RUNS}
LOST_WRITES: Shape = {"from_write": int, "to_write": Maybe(int)}
DAMAGE: Shape = {"file": str, "offset": int, "message": str, "still": str, "lost": Maybe(LOST_WRITES)}
SCRUB: Shape = {
    "state": re.compile("running|stopped|waiting|never"), "by": Maybe(str), "began": Maybe(TIME), "ended": Maybe(TIME),
    "oldest": Maybe(TIME), "age_seconds": Maybe(float), "bytes": int, "total": int, "interval": Maybe(int),
    "block": Maybe(int), "damages": int,
}  # fmt: skip
INTERVAL: Shape = {
    "number": int,
    "from_write": int,
    "to_write": int,
    "from_time": TIME,
    "to_time": TIME,
    "reason": str,
    "checkpoint_lsn": Maybe(LSN),
    "redo_lsn": Maybe(LSN),
    "timeline": Maybe(int),
    "next_xid": Maybe(int),
    "writes": int,
    "bytes_written": int,
    "blocks_changed": int,
    "stored": {"writes": int, "backward": int, "forward": int, "index": int, "transactions": int},
    "first": int,
    "restorable_by_write": bool,
    "lost": [LOST_WRITES],
    "outside": Maybe([OUTSIDE]),
    "verified": Maybe({"ok": bool, "time": TIME}),
}
TABLE: Shape = {
    **dict.fromkeys(("database", "schema", "name"), str),
    **dict.fromkeys(("inserted", "updated", "deleted", "rows"), int),
    **dict.fromkeys(("truncated", "dropped", "rewritten"), bool),
    "share": float,
}
TRANSACTION: Shape = {
    "xid": int,
    "status": str,
    "time": TIME,
    "lsn": LSN,
    "write": int,
    "timeline": int,
    "interval": Maybe(int),
    "database": Maybe(str),
    "share": float,
    "tables": [TABLE],
    "objects": [{"what": str, "database": Maybe(str), "name": str}],
    "statement": Maybe(str),
}
FULL: Shape = {"room": int, "bytes_per_second": Maybe(float), "over_seconds": Maybe(float), "seconds": Maybe(float)}
STATUS: Shape = {
    "set": str,
    "dsn": str,
    "state": re.compile("capturing|tracking|stalled|stopped"),
    "postgres": re.compile("running|stopped"),
    "last_write": int,
    "durable_write": int,
    "stored_write": int,
    "intervals": int,
    "lag_seconds": Maybe(float),
    "journal": {"bytes": int, "limit": int},
    "until_full": {"journal": Maybe(FULL), "store": Maybe(FULL), "volumes": [{"name": str, **FULL}]},
    "recovery_window": WINDOW,
    "outside": Maybe([OUTSIDE]),
    "scrub": Maybe(SCRUB),
    "held": {"holder": Maybe(int), "restarts": int, "resent": int, "problem": Maybe(str)},
    "volumes": [{"name": str, "device": Maybe(str), "backing": str, "mountpoint": str, "bytes": int}],
}
RESTART: Shape = {"time": TIME, "why": re.compile("died|upgrade"), "pid": Maybe(int), "seconds": float}
END: Shape = {"xid": int, "time": TIME, "lsn": LSN, "write": int, "status": str}
RESOLVED: Shape = {"recovery_point": POINT, "seconds": float, "outside": Maybe([OUTSIDE]),
                   "last_in": Maybe(END), "first_out": Maybe(END), "out": Maybe(int), "also_out": [END]}  # fmt: skip
RESTORE: Shape = {
    **RESOLVED,
    "to": str,
    "bytes": int,
    "tablespaces": [{"oid": int, "name": Maybe(str), "directory": str}],
    "configuration": [{"file": str, "from": str}],
    "configured": bool,
}
SHOW: Shape = {"write": int, "time": TIME, "volume": Maybe(str), "kind": str, "offset": int, "length": int,
               "interval": Maybe(int), "holds": {}}  # fmt: skip
CLONE: Shape = {"name": str, "dsn": str, "last_transaction": Maybe({"xid": int, "time": TIME}), "seconds": float,
                "recovery": {"from_lsn": Maybe(LSN), "to_lsn": Maybe(LSN), "seconds": float, "defaults": [str]},
                **RESOLVED}  # fmt: skip
CLONES: Shape = {"name": str, "set": Maybe(str), "store": Maybe(str),
                 "state": re.compile("running|opening|stopped|dead|damaged"),
                 "dsn": Maybe(str), "recovery_point": Maybe(POINT), "created": Maybe(TIME), "expires": Maybe(TIME),
                 "written_bytes": int, "memory_bytes": int, "problem": Maybe(str)}  # fmt: skip
STEP: Shape = {**CLONE, "from": POINT, "writes_passed": int, "writes": [SHOW], "rewinds_passed": int,
               "transactions_in": [END], "transactions_out": [END],
               "transactions": {"in": int, "out": int}}  # fmt: skip
GAP: Shape = {"from_write": int, "to_write": Maybe(int), "from_time": TIME, "to_time": Maybe(TIME), "reason": str,
              "blocks": int}  # fmt: skip
LOST: Shape = {"database": str, "schema": str, "name": str, "inserted": int, "updated": int, "deleted": int}
IN_PLACE: Shape = {
    **RESOLVED, "to": str, "bytes": int, "set": str, "undo": Maybe(str), "boundary": int, "timeline": int,
    "verified": bool, "down_seconds": float,
    "lost": {"transactions": Maybe(int), "oldest": Maybe(END), "newest": Maybe(END), "tables": [LOST]},
    "followers": Maybe([{"kind": str, "name": str, "where": str, "command": str}]),
}  # fmt: skip


def fits(value: Any, shape: Any, where: str = "") -> list[str]:
    """Where `value` is not of that shape. More keys than named are allowed."""
    if isinstance(shape, Maybe):
        return [] if value is None else fits(value, shape.shape, where)
    if isinstance(shape, re.Pattern):
        return [] if isinstance(value, str) and shape.fullmatch(value) else [f"{where}: {value!r}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [line for i, item in enumerate(value) for line in fits(item, shape[0], f"{where}[{i}]")]
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            return [f"{where}: {value!r} is no object"]
        missing = [f"{where}.{key} is missing" for key in shape if key not in value]
        return missing + [
            line for key in shape if key in value for line in fits(value[key], shape[key], f"{where}.{key}")
        ]
    if shape is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        right = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
    return [] if right else [f"{where}: {value!r} is no {shape.__name__}"]


EXPIRE: Shape = {
    "set": str,
    "dry_run": bool,
    "policy": {
        "keep_writes": Maybe(float), "keep_boundaries": Maybe(float), "keep_hourly": Maybe(float),
        "keep_daily": Maybe(float), "least_free": int,
    },
    "oldest": Maybe({"boundary": int, "time": TIME}),
    "joined": [{"first": int, "last": int}],
    "thinned": [int],
    "boundaries": [int],
    "writes": [{"from_write": int, "to_write": int, "from_time": TIME, "to_time": TIME}],
    "kept": [{"name": str, "write": int}],
    "views": [{"write": int}],
    "bytes": int,
    "waiting": Maybe(str),
    "failed": [str],
}  # fmt: skip
