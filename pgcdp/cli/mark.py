"""pgcdp mark"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.errors import UsageError


@click.command(
    epilog=options.examples(
        "pgcdp mark before-upgrade", "pgcdp mark main before-upgrade --keep", "pgcdp mark before-upgrade --unkeep"
    ),
    options_metavar="[OPTIONS]",
)
@click.argument("words", nargs=-1, metavar="[SET] NAME")
@click.option(
    "--keep", is_flag=True, help="Retention never lets go of this point (see pgcdp expire); an existing one is kept."
)
@click.option("--unkeep", is_flag=True, help="Set no mark: retention may let go of those of this name again.")
@options.output_option
def command(words: tuple[str, ...], keep: bool, unkeep: bool, output: str) -> None:
    """Put a named mark into the stream of writes: restore and verify take it as --target-name.

    With --keep the newest mark of that name is kept, if there is one: that of a rewind in place, for instance. Only
    where there is none, one is set.

    From inside of Postgres, SELECT pgcdp.mark('NAME') does the same, and pg_create_restore_point counts as well. Of
    several marks with one name the newest is meant. pgcdp info lists them.
    """
    from pgcdp import api

    set_name, name = options.split_set(words, "NAME")
    if keep and unkeep:
        raise UsageError("--keep and --unkeep are given together", "give one of them")
    if unkeep:
        screen.result(api.unkeep(set_name, name), output, _render_unkept)
    else:
        screen.result(api.mark(set_name, name, keep), output, _render)


def _render_unkept(value: Mapping[str, Any]) -> None:
    writes = ", ".join(map(str, [*value["earlier"], value["write"]]))
    screen.text(f'mark "{value["name"]}" at write {writes} is not kept any more')


def _render(value: Mapping[str, Any]) -> None:
    if value["existed"]:
        screen.text(f'mark "{value["name"]}", which was there at write {value["write"]}, is kept')
    else:
        kept = ", and is kept" if value["kept"] else ""
        screen.text(f'mark "{value["name"]}" is write {value["write"]}{kept}')
    if value["earlier"]:
        writes = ", ".join(map(str, value["earlier"]))
        screen.note(f"note: there was one of this name already, at write {writes}; --target-name means the newest")
