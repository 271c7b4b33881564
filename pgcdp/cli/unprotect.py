"""pgcdp unprotect"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen


@click.command(epilog=options.examples("pgcdp unprotect main", "pgcdp unprotect main --yes"))
@options.set_argument()
@click.option("--unstored", is_flag=True, help="Go without the last writes where the store does not take them.")
@options.yes_option
@options.output_option
def command(set_name: str | None, unstored: bool, yes: bool, output: str) -> None:
    """Bring a cluster back to plain storage.

    The cluster is stopped, its files are copied to an ordinary directory at the same path, and it is started again.
    Volume, journal and settings go; the store stays, and can still be restored from with --store. Where it does not
    take the last writes, since it is full or away, nothing is changed; with --unstored no point is left of them.
    """
    from pgcdp import api

    name = options.pick_set(set_name)
    options.confirm(f"the cluster of {name} will be stopped and moved back to plain files", yes, output)
    with screen.progress(output) as progress:
        value = api.unprotect(name, progress=progress, unstored=unstored)
    screen.result(value, output)
