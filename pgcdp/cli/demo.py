"""pgcdp demo"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen


@click.command(epilog=options.examples("pgcdp demo", "pgcdp demo --keep"))
@click.option("--keep", is_flag=True, help="Leave everything running afterwards, and say how to remove it.")
@options.output_option
def command(keep: bool, output: str) -> int:
    """All of it on a throw-away cluster, in about a minute.

    Makes a cluster in a directory of its own below /var/tmp, protects it, loads it, deletes rows by mistake, goes on
    loading, and then restores to a boundary and to single writes before and after the mistake, starting Postgres on
    each to prove it. Leaves nothing behind.
    """
    from pgcdp import demo

    with screen.progress(output) as progress:
        value = demo.run(keep=keep, progress=progress)
    screen.result(value, output, demo_text)
    return 0 if value["ok"] else 4
