"""The use cases that bring a recovery point back, to other files or in place. As in `pgcdp.api`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pgcdp import rewinding, transactions
from pgcdp.config import load_config
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.fsio import disk_errors
from pgcdp.opening import Announce, between, binaries_of, open_source, point_of, remember, scratch_place
from pgcdp.postgres import session
from pgcdp.postgres.cluster import Binaries
from pgcdp.postgres.followers import followers
from pgcdp.progress import Progress, Report, silent
from pgcdp.protecting import cut
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery import restore as writing
from pgcdp.recovery.left import naming_nearest
from pgcdp.recovery.restored_spaces import Restored
from pgcdp.recovery.source import Source
from pgcdp.verifying import verify

Json = dict[str, Any]
AGAIN = "mend that, then run the same again"


def resolve(set_name: str | None, target: Target, store: Path | None = None, *, before: str | None = None) -> Json:
    """What a target resolves to now: {"recovery_point", "last_in", "first_out", "out", "also_out"}."""
    source = open_source(set_name, store)
    return between(source, point_of(source, target, before))


def restore(
    set_name: str | None,
    target: Target,
    *,
    to_image: Path | None = None,
    to_directory: Path | None = None,
    tablespaces: Mapping[str, Path] = MappingProxyType({}),
    store: Path | None = None,
    before: str | None = None,
    announce: Announce | None = None,
    progress: Report = silent,
) -> Json:
    """Write the recovery point to image files or make a startable data directory.

    `tablespaces`: where those of a directory go, by name or OID; the others go beside it.
    """
    started = time.monotonic()
    source = open_source(set_name, store)
    point = point_of(source, target, before)
    with disk_errors(AGAIN):
        resolved = between(source, point)
    if announce is not None:
        announce(resolved)
    spaces: list[Restored] = []
    configuration: dict[str, str] = {}
    programs: Binaries | None = None
    if to_image is not None:
        with disk_errors(AGAIN), naming_nearest(source, point):
            place, size = to_image, writing.to_image(source, point, to_image, progress)
    else:
        assert to_directory is not None
        place = to_directory
        with suppress(PreconditionError):  # a store can be restored where there are none, if production is not there
            programs = binaries_of(source, set_name)
        with disk_errors(AGAIN), naming_nearest(source, point):
            size, spaces, configuration = writing.to_directory(
                source, point, to_directory, progress, tablespaces, programs
            )
    result: Json = {
        **resolved,
        "to": str(place),
        "bytes": size,
        "tablespaces": [{"oid": each.oid, "name": each.name, "directory": str(each.place)} for each in spaces],
        "configuration": [{"file": name, "from": path} for name, path in configuration.items()],
        "configured": to_directory is None or (to_directory / "postgresql.conf").exists(),
        "seconds": round(time.monotonic() - started, 3),
    }
    if store is None:
        remember(source, "restore", {**result, "interval": point.interval})
    return result


def rewind(
    set_name: str,
    target: Target,
    *,
    before: str | None = None,
    agree: Announce,
    prove: bool = True,
    progress: Report = silent,
) -> Json:
    """Bring production itself back to the target, in place. `agree` is told what that costs, and raises to stop it.

    With `prove` the boundary behind it is verified at the end ("verified"; else `null`).
    """
    started = time.monotonic()
    config = load_config(set_name)
    source = open_source(set_name, None)
    point = point_of(source, target, before)
    resolved = {**between(source, point), "lost": _lost(source, point), "followers": None}
    with suppress(PreconditionError), session.connect(session.Dsn.of(config)) as connection:  # it may be down
        resolved["followers"] = followers(connection)
    agree(resolved)
    with naming_nearest(source, point):
        done, down = rewinding.rewind(config, point, scratch_place(source), progress)
    undo = None if (target.kind, target.name) == ("name", done.mark) else done.mark
    result: Json = {
        **resolved,
        "set": set_name,
        "to": str(config.pgdata),
        "bytes": done.written,
        "undo": undo,
        "boundary": None,
        "timeline": None,
        "verified": None,
        "down_seconds": round(down, 3),
        "seconds": round(time.monotonic() - started, 3),
    }
    try:
        progress(Progress("cutting the boundary behind it"))
        boundary = cut(set_name)
        result |= {"boundary": boundary["number"], "timeline": boundary["timeline"]}
        if prove:
            proven = verify(set_name, Target("boundary", boundary["number"]), progress=progress)
            result["verified"] = proven["ok"]
    except PgcdpError as error:
        with suppress(PgcdpError, OSError):  # the store may be what fails
            remember(source, "restore", {**result, "interval": result["boundary"], "in_place": True})
        undone = f"pgcdp restore {set_name} --in-place --target-name {undo} undoes the rewind" if undo else None
        error.message = (
            f"{set_name} was rewound to write {point.write} and serves, but the boundary behind that was not proven: "
            f"{error.message}"
        )
        error.args = (error.message,)
        error.hint = "; ".join(part for part in (error.hint, undone) if part) or None
        raise
    result["seconds"] = round(time.monotonic() - started, 3)
    remember(source, "restore", {**result, "interval": boundary["number"], "in_place": True})
    return result


def _lost(source: Source, point: RecoveryPoint) -> Json:
    try:
        return transactions.lost_json(source, point)
    except (DamageError, PreconditionError) as error:  # the point itself may be right
        return {"transactions": None, "oldest": None, "newest": None, "tables": [], "unknown": error.message}
