"""pgcdp rebuild"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.errors import DamageError


@click.command(epilog=options.examples("pgcdp rebuild main"))
@options.set_argument()
@options.output_option
def command(set_name: str | None, output: str) -> int:
    """Make the catalog anew from the store.

    The catalog is only a quick copy of what the store says; nothing is lost with it. Where manifests are damaged, it
    says which intervals could not be read, and goes on with the rest; the exit code is 5 then. Of what an encrypted
    store has twice to be opened with, a damaged copy is written again from the other.
    """
    from pgcdp import api

    with screen.progress(output) as progress:
        value = api.rebuild(options.pick_set(set_name), progress)
    screen.result(value, output, _render)
    return DamageError.exit_code if value["damages"] else 0


def _render(value: Mapping[str, Any]) -> None:
    screen.pairs([("set", value["set"]), ("intervals", str(value["intervals"]))])
    for each in value["damages"]:
        screen.text(f"not read: {each}")
    for each in value["unread"]:
        numbers = f"{each['first']}-{each['last']}" if each["first"] < each["last"] else str(each["last"])
        screen.text(f"interval {numbers} is not in the catalog; pgcdp info {value['set']} tells what can be restored")
