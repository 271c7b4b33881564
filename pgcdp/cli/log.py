"""pgcdp log"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgcdp import units
from pgcdp.cli import options, screen
from pgcdp.errors import TargetError, UsageError
from pgcdp.recovery.nearest import dotted_name

if TYPE_CHECKING:
    from pgcdp.records import Rewind

COLUMNS = ("time", "xid", "status", "write", "lsn", "table", "did", "share")
OTHERS = "there may be other transactions, and those that are listed may have done more: {}"
OPERATIONS = ("insert", "update", "delete", "truncate", "drop", "rewrite")


@click.command(
    epilog=options.examples(
        "pgcdp log",
        "pgcdp log main --table orders --op delete",
        'pgcdp log --since "2026-11-22 14:00" --until "2026-11-22 15:00" --limit 100',
        "pgcdp log --follow",
    )
)
@options.set_argument()
@click.option("--table", metavar="T", help="Only what touched this table, or a partition of it; [SCHEMA.]NAME.")
@click.option("--op", "operation", type=click.Choice(OPERATIONS), help="Only what did this to a table.")
@click.option("--xid", type=options.xid_number, metavar="N", help="The transaction of this id, or that it belongs to.")
@click.option("--since", type=units.parse_time, metavar="T", help="Not earlier than this.")
@click.option("--until", type=units.parse_time, metavar="T", help="Not later than this.")
@click.option("--follow", "-f", is_flag=True, help="Go on with those that end from now on, until Ctrl-C.")
@options.search_options
@options.store_option
@options.output_option
def command(
    set_name: str | None,
    table: str | None,
    operation: str | None,
    xid: int | None,
    since: int | None,
    until: int | None,
    follow: bool,
    database: str | None,
    limit: int,
    branch: int | None,
    store: Path | None,
    output: str,
) -> None:
    """Transactions, newest first: when they ended, where, and what they did to which table.

    "share" is the part of the table's rows that was touched, so that a mass delete stands out. --table without a schema
    means the tables of that name in all schemas. System catalogs and indexes are not shown. With --follow and
    --output json, one object a line. After a rewind in place --follow goes on with the new branch.
    """
    from pgcdp import api

    wanted: dict[str, Any] = {
        "table": table, "operation": operation, "xid": xid, "since_ns": since, "until_ns": until,
        "database": database, "limit": limit, "branch": branch or 0,
    }  # fmt: skip
    name = options.pick_set_or_store(set_name, store)
    if not follow:
        screen.result(api.log(name, store, **wanted), output, render)
        return
    if name is None:
        raise UsageError("--follow needs a set: nothing is added to a store alone", "name the set instead of --store")
    if output == "text":
        screen.text("  ".join(COLUMNS), flush=True)

    def say(line: str) -> None:
        if output == "text":
            screen.note(line)

    def waiting() -> None:
        say(f"set {name} is stopped: waiting until it goes on (pgcdp up {name}), or Ctrl-C")

    def rewound(rewind: Rewind) -> None:
        say(f"set {name} was rewound to write {rewind.to_write}: what follows is on its new branch")

    def unseen(said: str) -> None:
        say(OTHERS.format(said))

    for told in api.follow(name, waiting, rewound, unseen, **wanted):
        screen.result(told, output, _line)


def render(value: Mapping[str, Any]) -> None:
    """Transactions as a table, a line for each table touched."""
    rows, below = [], {}
    for told in value["transactions"]:
        rows += _rows(told)
        if told["statement"] is not None:
            below[len(rows) - 1] = told["statement"]
    screen.table(COLUMNS, rows, below)
    more = value["total"] - len(value["transactions"])
    if more > 0:
        screen.note(f"{more} more; --limit shows more of them")
    if not value["total"]:
        screen.note("no transaction is like that")
    if value["note"]:
        screen.note(value["note"])
    if value["left_out"]:
        screen.note(
            f"behind the last boundary {value['left_out']} records about names of tables were left out: names may be "
            "missing"
        )
    if value["unseen"]:
        screen.note(OTHERS.format(value["unseen"]))
    for each in value["gaps"] or ():
        screen.note(screen.gap(each))


def candidates(failure: TargetError) -> list[str]:
    """The lines of what an error names to choose from."""
    lines = screen.aligned(COLUMNS, [row for told in failure.candidates for row in _rows(told)])
    return [*lines, f"and {failure.more} more, which pgcdp find lists"] if failure.more > 0 else lines


def _rows(told: Mapping[str, Any]) -> list[list[str]]:
    head = [told["time"], str(told["xid"]), told["status"], str(told["write"]), told["lsn"]]
    cells = [(_name(table), _did(table), _share(table["share"])) for table in told["tables"]]
    cells += [
        (f"{gone['what']} {_in_database(gone['database'], gone['name'])}", "dropped", "-") for gone in told["objects"]
    ]
    shown = []
    for each in cells or [("-", "-", "-")]:
        shown.append([*head, *each])
        head = [""] * len(head)
    return shown


def _name(table: Mapping[str, Any]) -> str:
    return _in_database(table["database"], dotted_name(table["schema"], table["name"]))


def _in_database(database: str | None, name: str) -> str:
    return f"{database}:{name}" if database else name


def _did(table: Mapping[str, Any]) -> str:
    words = [f"{table[name]} {name}" for name in ("inserted", "updated", "deleted") if table[name]]
    words += [name for name in ("truncated", "dropped", "rewritten") if table[name]]
    return ", ".join(words) or "created"


def _share(part: float) -> str:
    return "-" if part == 0 else f"{part:.0%}" if part >= 0.005 else "<1%"


def _line(told: Mapping[str, Any]) -> None:
    for row in _rows(told):
        screen.text("  ".join(cell for cell in row if cell), flush=True)
    if told["statement"] is not None:
        screen.text(screen.one_line(told["statement"]), flush=True)
