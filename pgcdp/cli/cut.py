"""pgcdp cut"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen
from pgcdp.cli.info import intervals_table


@click.command(epilog=options.examples("pgcdp cut", "pgcdp cut main --output json"))
@options.set_argument()
@options.output_option
def command(set_name: str | None, output: str) -> None:
    """Run a checkpoint now and close the interval at it.

    Returns when the interval is stored, and prints its number.
    """
    from pgcdp import api

    screen.result(api.cut(options.pick_set(set_name)), output, lambda value: intervals_table([value]))
