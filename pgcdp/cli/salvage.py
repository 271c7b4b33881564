"""pgcdp salvage"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.cli.restore import announce
from pgcdp.errors import UsageError
from pgcdp.recovery.nearest import dotted_name
from pgcdp.units import format_duration


@click.command(
    epilog=options.examples(
        'pgcdp salvage --before "DELETE FROM orders" --table orders',
        'pgcdp salvage main --before "DELETE FROM orders" --table orders --diff --apply',
        "pgcdp salvage main --target-xid 812934 --exclusive --table sales.invoices --file /tmp/invoices.csv",
        'pgcdp salvage --target-time "2026-11-22 14:03" --schema sales --file /tmp/sales.dump',
    )
)
@options.set_argument()
@options.target_options
@click.option("--table", "tables", multiple=True, metavar="T", help="A table, [SCHEMA.]NAME; may be given again.")
@click.option("--schema", metavar="S", help="All tables of a schema.")
@click.option("--database", metavar="D", help="The database that they were in.")
@click.option("--where", metavar="SQL", help="Only the rows for which this is true.")
@click.option("--into", metavar="DSN", help="Another running database, as psql takes it.")
@click.option("--as", "name", metavar="NAME", help="Name of the new table instead of NAME_salvaged.")
@click.option(
    "--file",
    type=click.Path(path_type=Path),
    metavar="F",
    help="Write a file instead: .csv, .sql, or .dump (pg_dump's custom format).",
)
@click.option("--diff", is_flag=True, help="Only show which rows were deleted, changed or added since, by primary key.")
@click.option("--apply", is_flag=True, help="With --diff: put back what was deleted and changed, after asking.")
@options.store_option
@options.yes_option
@options.output_option
def command(
    set_name: str | None,
    tables: tuple[str, ...],
    schema: str | None,
    database: str | None,
    where: str | None,
    into: str | None,
    name: str | None,
    file: Path | None,
    diff: bool,
    apply: bool,
    store: Path | None,
    yes: bool,
    output: str,
    **given: Any,
) -> None:
    """Bring back one table's rows as they were, without a restore.

    They come into a new table NAME_salvaged of the running database, or into a file. Nothing else is touched. With
    --diff --apply the rows that were deleted or changed since are put back into the table itself; rows that were added
    since stay. All tables are put back or none: nothing is written when rows changed since they were shown, or when
    triggers would change what is put back. What somebody else has locked is waited for 10 seconds. A schema that was
    dropped since must be made first.
    """
    from pgcdp import api
    from pgcdp.recovery.salvage import Wanted

    target, before = options.pick_target(given)
    if bool(tables) == (schema is not None):
        raise UsageError("give --table T or --schema S, and only one of them", "--table orders")
    if file is not None and (diff or into is not None):
        raise UsageError("--file cannot be given with --diff or --into", "give one of them")
    if apply and not diff:
        raise UsageError("--apply needs --diff", "--diff --apply shows what differs, then asks")
    set_or_none = options.pick_set_or_store(set_name, store)
    with screen.progress(output) as progress:
        value = api.salvage(
            set_or_none,
            target,
            Wanted(tables, schema, where, database),
            store=store,
            before=before,
            into=into,
            announce=announce if output == "text" else None,
            progress=progress,
            file=None if file is None else file.absolute(),
            name=name,
            diff=diff,
            agree=_asking(yes, output) if apply else None,
        )
    screen.result(value, output, _render)


def _asking(yes: bool, output: str) -> Callable[[Mapping[str, Any]], None]:
    def ask(told: Mapping[str, Any]) -> None:
        if output == "text":
            _difference(told)
        found, place = told["difference"], dotted_name(told["schema"], told["name"])
        options.confirm(
            f"{found['deleted']} rows of {place} will be inserted, {found['changed']} updated",
            yes,
            output,
        )

    return ask


def _render(value: Mapping[str, Any]) -> None:
    for told in value["tables"]:
        place = dotted_name(told["schema"], told["name"])
        if told.get("put_back") is not None:
            done, kept = told["put_back"], told["difference"]["added"]
            if any(done.values()):
                screen.text(f"{place}: {done['inserted']} rows inserted, {done['updated']} updated")
            else:
                screen.text(f"{place}: nothing to put back, no row is gone or changed; {kept} newer ones are kept")
        elif "difference" in told:
            _difference(told)
        else:
            screen.text(f"{place}: {told['rows']} rows into {told.get('into', value['to'])}")
            if told.get("note"):
                screen.note(f"note: {told['note']}")
    screen.note(f"took {format_duration(value['seconds'])}")


def _difference(told: Mapping[str, Any]) -> None:
    found = told["difference"]
    screen.text(f"{dotted_name(told['schema'], told['name'])}: since then")
    for name in ("deleted", "changed", "added"):
        shown = ["/".join(str(value) for value in row.values()) for row in found["samples"][name]]
        more = ", ..." if found[name] > len(shown) else ""
        screen.text(f"  {name}: {found[name]} rows" + (f", keys {', '.join(shown)}{more}" if shown else ""))
