"""pgcdp mark"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import options, screen


@click.command(
    epilog=options.examples("pgcdp mark before-upgrade", "pgcdp mark main before-upgrade --output json"),
    options_metavar="[OPTIONS]",
)
@click.argument("words", nargs=-1, metavar="[SET] NAME")
@options.output_option
def command(words: tuple[str, ...], output: str) -> None:
    """Put a named mark into the stream of writes: restore and verify take it as --target-name.

    From inside of Postgres, SELECT pgcdp.mark('NAME') does the same, and pg_create_restore_point counts as well. Of
    several marks with one name the newest is meant. pgcdp info lists them.
    """
    from pgcdp import api

    set_name, name = options.split_set(words, "NAME")
    screen.result(api.mark(set_name, name), output, _render)


def _render(value: Mapping[str, Any]) -> None:
    screen.text(f'mark "{value["name"]}" is write {value["write"]}')
    if value["earlier"]:
        writes = ", ".join(map(str, value["earlier"]))
        screen.note(f"note: there was one of this name already, at write {writes}; --target-name means the newest")
