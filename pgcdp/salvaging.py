"""The use case of `pgcdp salvage`: rows as they were, into the running database or a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pgcdp.errors import PgcdpError, UsageError
from pgcdp.postgres import session
from pgcdp.postgres.cluster import Binaries
from pgcdp.postgres.tables import TableShape
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery import salvage
from pgcdp.recovery.salvage import Running, Wanted
from pgcdp.recovery.sandbox import Sandbox
from pgcdp.recovery.source import Source

Json = dict[str, Any]
Agree = Callable[[Json], None]
"""Is shown a difference before rows are put back; raises to stop."""


def run(
    source: Source,
    point: RecoveryPoint,
    wanted: Wanted,
    *,
    below: Path,
    hide: Sequence[Path] = (),
    binaries: Binaries,
    connect: Callable[[str], session.Connection],
    file: Path | None = None,
    name: str | None = None,
    diff: bool = False,
    agree: Agree | None = None,
    progress: Report = silent,
) -> Json:
    """Salvage tables. `connect(database)` reaches the running database; `agree`: put back what differs.

    `hide` is what Postgres on the recovery point must not see of the running cluster.

    Returns {"database", "tables", "to", "seconds"}; of each table "schema", "name", and what was done.
    """
    began = time.monotonic()
    if name is not None and (len(wanted.tables) != 1 or diff or file is not None):
        raise UsageError("--as names the new table of one table", "leave it out")
    with salvage.opened(source, point, below, binaries, hide, progress) as box:
        database, shapes = salvage.find_tables(box, wanted)
        if file is not None:
            progress(Progress(f"writing {file}"))
            rows = salvage.to_file(box, database, shapes, wanted, file)
            told = [{"schema": shape.schema, "name": shape.name, "rows": rows} for shape in shapes]
            to = str(file)
        else:
            with connect(database) as connection:
                running = Running(connection)
                told = [_one(running, box, database, shape, wanted, name, diff, agree, progress) for shape in shapes]
            to = f"database {database}"
    return {"database": database, "tables": told, "to": to, "seconds": round(time.monotonic() - began, 3)}


def _one(
    running: Running, box: Sandbox, database: str, shape: TableShape, wanted: Wanted, name: str | None, diff: bool,
    agree: Agree | None, progress: Report,
) -> Json:  # fmt: skip
    told: Json = {"schema": shape.schema, "name": shape.name}
    if not diff:
        progress(Progress(f"copying {shape}"))
        place = name or f"{shape.name}_salvaged"
        return {**told, "rows": running.take(box, database, shape, wanted, place), "into": f"{shape.schema}.{place}"}
    progress(Progress(f"comparing {shape}"))
    found = running.compare(box, database, shape, wanted)
    told |= {"difference": asdict(found), "put_back": None}
    if agree is None:
        return told
    if not found.deleted and not found.changed:
        return {**told, "put_back": {"inserted": 0, "updated": 0}}
    agree(told)
    inserted, updated = running.put_back(shape, wanted, found)
    if (inserted, updated) != (found.deleted, found.changed):  # a rule or a trigger of the table's
        raise PgcdpError(
            f"{inserted} rows were inserted and {updated} updated in {shape}, not {found.deleted} and {found.changed}",
            "its triggers or rules took part; compare again with --diff",
        )
    return {**told, "put_back": {"inserted": inserted, "updated": updated}}
