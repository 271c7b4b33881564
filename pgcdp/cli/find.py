"""pgcdp find"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pgcdp.cli import log, options, screen


@click.command(
    epilog=options.examples(
        'pgcdp find "DELETE FROM orders"',
        'pgcdp find main "DROP TABLE sales.invoices" --newest',
        'pgcdp find "TRUNCATE orders" --output json',
    )
)
@click.argument("words", nargs=-1, metavar="[SET] SQL")
@click.option("--newest", is_flag=True, help="The newest first, instead of the largest share of the table.")
@options.search_options
@options.store_option
@options.output_option
def command(
    words: tuple[str, ...],
    newest: bool,
    database: str | None,
    limit: int,
    branch: int | None,
    store: Path | None,
    output: str,
) -> None:
    """The transactions that did what a statement does, largest share of the table first.

    The statement is read for its operation and its tables; conditions do not count. A table without a schema means
    those of that name in all schemas. Nothing needs to be logged by Postgres. INSERT, UPDATE, DELETE, MERGE, COPY FROM,
    TRUNCATE, CREATE TABLE, DROP TABLE, DROP SCHEMA, DROP DATABASE, and what rewrites a table (ALTER TABLE, VACUUM FULL,
    CLUSTER). What was done to partitions and heirs counts for the table that they belong to; only DROP TABLE must have
    dropped the table itself. Where Postgres logs statements with their transactions (csvlog or jsonlog), the statement
    is shown as well.
    """
    from pgcdp import api

    if store is not None:
        sql, name = options.last_word(words, "SQL"), None
    else:
        name, sql = options.split_set(words, "SQL")
    value = api.find(name, sql, store, newest=newest, database=database, limit=limit, branch=branch or 0)
    where = ("" if store is None else f" --store {store}") + (f" --branch {branch}" if branch else "")
    screen.result(value, output, lambda told: _render(told, where))


def _render(value: Mapping[str, Any], where: str) -> None:
    from pgcdp import transactions

    log.render(value)
    told = value["transactions"]
    if not told or told[0]["status"] == "aborted":
        return
    first = told[0]["xid"]
    earliest = transactions.earliest([each for each in told if each["status"] != "aborted"])["xid"]
    screen.note(f"just before the first one listed (xid {first}): {_restore(where, first)}")
    if earliest != first:
        screen.note(f"just before the earliest one listed (xid {earliest}): {_restore(where, earliest)}")


def _restore(where: str, xid: int) -> str:
    return f"pgcdp restore{where} --target-xid {xid} --exclusive --to-directory DIR"
