"""pgcdp step"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import clone, options, screen
from pgcdp.cli.restore import announce_point, counted
from pgcdp.errors import UsageError


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog=options.examples("pgcdp step main-1", "pgcdp step main-1 -3 --commit", "pgcdp step main-1 100"),
)
@click.argument("name", metavar="CLONE")
@click.argument("count", metavar="[N]", default="1")
@click.option("--commit", is_flag=True, help="N commits instead of N writes.")
@options.key_options("Where the key of the clone's store is, if it is encrypted")
@options.output_option
def command(name: str, count: str, commit: bool, output: str) -> None:
    """Move a clone N writes (or commits) onward, or back with a negative N.

    What it passes is shown: the writes and what they held, the transactions that came in or went out. What was written
    to the clone itself is dropped, and its sessions end.
    """
    from pgcdp import api

    try:
        number = int(count)
    except ValueError:
        raise UsageError(f'"{count}" is not a number of writes', "give a whole number, such as 1 or -3") from None
    with screen.progress(output) as progress:
        value = api.step(name, number, commits=commit, progress=progress)
    screen.result(value, output, _render)


def _render(value: Mapping[str, Any]) -> None:
    rows = [
        [str(row["write"]), row["time"], row["kind"], row["volume"] or "", row["holds"]["what"]]
        for row in value["writes"]
    ]
    if rows:
        screen.table(["write", "time", "kind", "volume", "holds"], rows)
    more = value["writes_passed"] - len(rows)
    if more > 0:
        screen.text(f"and {counted(more, 'more write')}")
    if value["rewinds_passed"]:
        screen.text(f"{counted(value['rewinds_passed'], 'rewind')} in place between: what is told is the difference")
    for way, word in (("out", "went out"), ("in", "came in")):
        told = value[f"transactions_{way}"]
        for each in told:
            screen.text(f"transaction {each['xid']} {word}: committed {each['time']}")
        if value["transactions"][way] > len(told):
            screen.text(f"and {value['transactions'][way] - len(told)} more {word}")
    screen.text("what was written to the clone is dropped")
    announce_point(value)
    clone.render(value)
