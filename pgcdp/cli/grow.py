"""pgcdp grow"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp import units
from pgcdp.cli import options, screen
from pgcdp.sets import list_sets
from pgcdp.units import format_size


@click.command(
    epilog=options.examples(
        "pgcdp grow 40G",
        "pgcdp grow main 40G",
        "pgcdp grow main --volume wal 8G",
        "pgcdp grow main --volume ts-fast        after lvextend of its device",
    ),
    options_metavar="[OPTIONS]",
)
@click.argument("words", nargs=-1, metavar="[SET] [SIZE]")
@click.option("--volume", "volume", metavar="NAME", help="Which volume. Default: that of the data directory.")
@options.output_option
def command(words: tuple[str, ...], volume: str | None, output: str) -> None:
    """Give a volume more room, while the cluster runs on it.

    A volume in an image file gets SIZE. One on a block device takes up what the device has become larger by, and SIZE
    is left out. Killed anywhere, the same command finishes it.
    """
    from pgcdp import api

    name, size = _words(words)
    with screen.progress(output) as progress:
        value = api.grow(options.pick_set(name), size, volume, progress=progress)
    screen.result(value, output, _render)


def _words(words: tuple[str, ...]) -> tuple[str | None, int | None]:
    """SET and SIZE of "[SET] [SIZE]": a word alone that names a set is that."""
    if len(words) == 1 and words[0] in list_sets():
        return words[0], None
    if not words:
        return None, None
    name, size = options.split_set(words, "SIZE")
    return name, units.parse_size(size)


def _render(value: Mapping[str, Any]) -> None:
    held = value["filesystem"]
    screen.text(
        f"volume {value['volume']} has {format_size(value['bytes'])}; its filesystem holds "
        f"{format_size(held['after'])}, before {format_size(held['before'])}"
    )
