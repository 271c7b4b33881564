"""pgcdp mark"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen


@click.command(
    epilog=options.examples("pgcdp mark before-upgrade", "pgcdp mark main before-upgrade --output json"),
    options_metavar="[OPTIONS]",
)
@click.argument("words", nargs=-1, metavar="[SET] NAME")
@options.output_option
def command(words: tuple[str, ...], output: str) -> None:
    """Put a named mark into the stream of writes.

    It prints the write number that the mark got, which is what restore and verify take as --target-write.
    """
    from pgcdp import api

    set_name, name = options.split_set(words, "NAME")
    screen.result(api.mark(set_name, name), output)
