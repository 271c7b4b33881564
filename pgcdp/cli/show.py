"""pgcdp show"""

from __future__ import annotations

import click

from pgcdp.cli import options, screen


@click.command(epilog=options.examples("pgcdp show 48213", "pgcdp show main 48213 --output json"))
@click.argument("words", nargs=-1, metavar="[SET] WRITE")
@options.output_option
def command(words: tuple[str, ...], output: str) -> None:
    """One captured write: time, place, what it holds."""
    from pgcdp import api

    set_name, word = options.split_set(words, "WRITE")
    write = options.write_number(word)
    screen.result(api.show(set_name, write), output)
