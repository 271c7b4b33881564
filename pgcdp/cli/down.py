"""pgcdp down"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen
from pgcdp.cli.status import render


@click.command(epilog=options.examples("pgcdp down main"))
@options.set_argument()
@options.output_option
def command(set_name: str | None, output: str) -> None:
    """Stop Postgres, detach the volumes cleanly.

    The service stops too. Afterwards each volume is a plain filesystem, which can be mounted without pgcdp. Do not
    write to it: writes that the journal lacks would falsify every later restore.
    """
    from pgcdp import api

    with screen.progress(output) as progress:
        value = api.down(options.pick_set(set_name), progress=progress)
    screen.result(value, output, render)
