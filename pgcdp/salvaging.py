"""The use case of `pgcdp salvage`: rows as they were, into the running database or a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pgcdp.errors import UsageError
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
BARE = (
    "{table} itself is gone, and the new table has only its columns and rows: no primary key, NOT NULL, defaults, "
    "indexes or grants. To have it whole, salvage it with --file {dump}, then: pg_restore --dbname={database} {dump}"
)
"""What is said of a new table where the one that it was taken from is no more."""
Agree = Callable[[Json], None]
"""Is shown each table's difference before any rows are put back; raises to stop."""


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
    likely: str | None = None,
    progress: Report = silent,
) -> Json:
    """Salvage tables. `connect(database)` reaches the running database; `agree`: put back what differs.

    `hide` is what Postgres on the recovery point must not see of the running cluster. `likely`: the database that is
    meant where none is named and several have the tables.

    Returns {"database", "tables", "to", "seconds"}; of each table "schema", "name", and what was done, for a new one
    also "note": what to know of it, or None.
    """
    began = time.monotonic()
    if name is not None and (len(wanted.tables) != 1 or diff or file is not None):
        raise UsageError("--as names the new table of one table", "leave it out")
    with salvage.opened(source, point, below, binaries, hide, progress) as box:
        database, shapes = salvage.find_tables(box, wanted, likely)
        if file is not None:
            progress(Progress(f"writing {file}"))
            rows = salvage.to_file(box, database, shapes, wanted, file)
            told = [
                {"schema": shape.schema, "name": shape.name, "rows": count}
                for shape, count in zip(shapes, rows, strict=True)
            ]
            to = str(file)
        else:
            with connect(database) as connection:
                running = Running(connection)
                if diff:
                    told = _compare(running, box, database, shapes, wanted, agree, progress)
                else:
                    told = [_new_table(running, box, database, shape, wanted, name, progress) for shape in shapes]
            to = f"database {database}"
    return {"database": database, "tables": told, "to": to, "seconds": round(time.monotonic() - began, 3)}


def check_file(file: Path | None) -> None:
    """A file can be written there, of a format that its name tells. Raises UsageError or PreconditionError."""
    if file is not None:
        salvage.check_file(file)


def _new_table(
    running: Running, box: Sandbox, database: str, shape: TableShape, wanted: Wanted, name: str | None, progress: Report
) -> Json:
    progress(Progress(f"copying {shape}"))
    place = name or f"{shape.name}_salvaged"
    rows = running.take(box, database, shape, wanted, place)
    note = None if running.has(shape) else BARE.format(table=shape, dump=f"{shape.name}.dump", database=database)
    return {"schema": shape.schema, "name": shape.name, "rows": rows, "into": f"{shape.schema}.{place}", "note": note}


def _compare(
    running: Running, box: Sandbox, database: str, shapes: Sequence[TableShape], wanted: Wanted, agree: Agree | None,
    progress: Report,
) -> list[Json]:  # fmt: skip
    progress(Progress(f"comparing {', '.join(map(str, shapes))}"))
    compared = running.compare(box, database, shapes, wanted)
    told: list[Json] = [
        {"schema": each.shape.schema, "name": each.shape.name, "difference": asdict(each.difference), "put_back": None}
        for each in compared
    ]
    if agree is None:
        return told
    lost = [each for each in compared if each.difference.deleted or each.difference.changed]
    for each in lost:
        agree(told[each.number])
    done = dict(zip((each.number for each in lost), running.put_back(lost), strict=True))
    for each in compared:
        inserted, updated = done.get(each.number, (0, 0))
        told[each.number]["put_back"] = {"inserted": inserted, "updated": updated}
    return told
