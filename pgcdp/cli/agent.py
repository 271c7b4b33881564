"""pgcdp agent"""

from __future__ import annotations

import click

from pgcdp.cli import options


@click.command(hidden=True, epilog=options.examples("pgcdp agent main"))
@options.set_argument(required=True)
@options.output_option
def command(set_name: str, output: str) -> int:
    """Run the service of a set in the foreground: it cuts intervals and brings them into the store.

    `pgcdp up` starts it; it ends with SIGTERM. It prints nothing but its log.
    """
    from pgcdp import agent

    return agent.main(set_name)
