"""pgcdp up"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen
from pgcdp.cli.status import render


@click.command(epilog=options.examples("pgcdp up main"))
@options.set_argument()
@options.output_option
def command(set_name: str | None, output: str) -> None:
    """Attach and mount the volumes, start Postgres.

    The service that cuts intervals starts too. After a crash of any part, what is left is cleared away first, and
    the volumes are brought up to the journal. Harmless when everything runs already.
    """
    from pgcdp import api

    with screen.progress(output) as progress:
        value = api.up(options.pick_set(set_name), progress=progress)
    screen.result(value, output, render)
