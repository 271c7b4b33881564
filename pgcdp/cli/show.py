"""pgcdp show"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.recovery.nearest import dotted_name
from pgcdp.units import format_size


@click.command(epilog=options.examples("pgcdp show 48213", "pgcdp show main 48213 --output json"))
@click.argument("words", nargs=-1, metavar="[SET] WRITE")
@options.output_option
def command(words: tuple[str, ...], output: str) -> None:
    """One captured write: time, place, what it holds.

    That is WAL with the transactions that ended in it, pg_control, pages of a relation, another file of the data
    directory, a mark, or the filesystem's own (its log, inodes, directories).
    """
    from pgcdp import api

    set_name, word = options.split_set(words, "WRITE")
    write = options.write_number(word)
    screen.result(api.show(set_name, write), output, _render)


def _render(value: Mapping[str, Any]) -> None:
    holds = value["holds"]
    shown = [(screen.label(key), screen.value_text(key, value[key])) for key in value if key != "holds"]
    screen.pairs([*shown, ("holds", holds["what"]), *_details(holds)])


def _details(holds: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "mark" in holds:
        yield "mark", holds["mark"]
    if "wal" in holds:
        yield "wal", f"{holds['wal']['from_lsn']} to {holds['wal']['to_lsn']}"
    for each in holds.get("transactions", ()):
        yield "transaction", f"{each['xid']} {each['status']} {each['time']}, {each['lsn']}"
    if "pg_control" in holds:
        yield "pg_control", screen.value_text("pg_control", holds["pg_control"])
    for each in holds.get("files", ()):
        yield "file" if not each["earlier"] else "earlier", _owner(each)


def _owner(each: Mapping[str, Any]) -> str:
    size = format_size(each["length"])
    if each["file"] is None:
        return f"{size} of the filesystem's own"
    relation = each["relation"]
    if relation is None:
        return f"{size} of {each['file']} at {each['offset']}"
    name = dotted_name(relation["schema"], relation["name"]) if relation["name"] else "a relation without a known name"
    fork = "" if relation["fork"] == "main" else f", {relation['fork']}"
    return f"{size} of {each['file']}{fork}: page {relation['page']} of {name} in {relation['database']}"
