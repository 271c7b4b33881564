"""pgcdp rebuild"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen


@click.command(epilog=options.examples("pgcdp rebuild main"))
@options.set_argument()
@options.output_option
def command(set_name: str | None, output: str) -> None:
    """Make the catalog anew from the store.

    The catalog is only a quick copy of what the store says; nothing is lost with it.
    """
    from pgcdp import api

    with screen.progress(output) as progress:
        value = api.rebuild(options.pick_set(set_name), progress)
    screen.result(value, output)
