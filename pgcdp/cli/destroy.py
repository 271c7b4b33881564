"""pgcdp destroy"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen


@click.command(epilog=options.examples("pgcdp destroy main-1"))
@click.argument("name", metavar="CLONE")
@options.output_option
def command(name: str, output: str) -> None:
    """End a clone and remove all of it: processes, mounts, what was written to it."""
    from pgcdp import api

    screen.result(api.destroy(name), output, lambda value: screen.text(f"clone {value['name']} is gone"))
