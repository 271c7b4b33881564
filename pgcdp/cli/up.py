"""pgcdp up"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from pgcdp.cli import options, screen
from pgcdp.cli.status import render
from pgcdp.units import format_size

if TYPE_CHECKING:
    from pgcdp.healing import Differences
    from pgcdp.remaking import Lost


@click.command(
    epilog=options.examples(
        "pgcdp up main", "pgcdp up main --heal", "pgcdp up main --remake data", "pgcdp up main --upgrade"
    )
)
@options.set_argument()
@click.option(
    "--heal", is_flag=True, help="Take in what was changed on the volumes while they were detached, as a gap."
)
@click.option(
    "--take-over",
    is_flag=True,
    help="Journal and store of another machine, which is gone for good, are this one's now.",
)
@click.option(
    "--upgrade",
    is_flag=True,
    help="Swap what captures for the installed version while Postgres runs on; its writes wait for a moment.",
)
@click.option(
    "--remake",
    "lost",
    multiple=True,
    metavar="VOLUME",
    help="Write a volume whose disk is lost anew, at the same place, from store and journal.",
)
@options.yes_option
@options.output_option
def command(
    set_name: str | None, heal: bool, take_over: bool, upgrade: bool, lost: tuple[str, ...], yes: bool, output: str
) -> None:
    """Attach and mount the volumes, start Postgres.

    The service that cuts intervals starts too. After a crash of any part, what is left is cleared away first, and
    the volumes are brought up to the journal. Harmless when everything runs already.

    A volume that somebody wrote to while it was detached is refused. With --heal all of each volume is compared with
    what was captured; you are shown how much differs, and asked. It is then captured as it is, between two records: a
    gap, in which no recovery point lies. All points before and behind it stay right. The same with a journal that
    cannot be read any more: it begins anew behind what the store has. What was only in it, the volumes have, if the
    set was stopped with pgcdp down; its old segments are set aside in it, and yours to remove.

    A volume whose disk died, or whose image file was removed, is refused too. Put another disk at its place (mount it
    where the image file was, or attach it under the same device path), then name it with --remake: it is written out as
    it is at the newest write, which store and journal have. Nothing is lost. Where the set still runs, it is ended
    first, as by a crash.

    A set whose journal or store belongs to another machine, or to another state root, is refused: this may be a copy of
    it. --take-over moves it here, unless the other one is seen to live: for 25 s it is watched whether the store is
    renewed from there, and, after an unclean stop, whether journal or volumes are written to. Not seen is a capture
    that has nothing to write in that time, or that has a copy of these disks: make sure that the other machine is off.
    """
    from pgcdp import api

    name = options.pick_set(set_name)

    def agree(found: Differences) -> None:
        told = [each for each in (found.changed, found.unreadable) if each]
        told += [f"volume {each}: {n // 4096} blocks differ ({format_size(n)})" for each, n in found.volumes.items()]
        if found.lost:
            told += [f"writes {found.lost[0]} to {found.lost[1]} were only in the journal: no point is left of them"]
        for line in told if output == "text" else ():
            screen.note(line)
        if not found.volumes:
            options.confirm("the first backup image is not complete, and will be begun anew", yes, output)
            return
        options.confirm(f"what differs on the volumes of {name} will be taken in as a gap", yes, output)

    def agree_to_write(found: Sequence[Lost]) -> None:
        for each in found if output == "text" else ():
            size, place = format_size(each.volume.bytes), each.volume.backing
            holds = f", which holds {', '.join(each.holds)}" if each.holds else ""
            screen.note(f"volume {each.volume.name}: {size} will be written to {place}{holds}")
        options.confirm(
            f"volumes of {name} will be written anew, from store and journal; what runs is ended", yes, output
        )

    with screen.progress(output) as progress:
        value = api.up(
            name,
            progress,
            heal=agree if heal else None,
            remake=lost,
            agree=agree_to_write,
            take_over=take_over,
            upgrade=upgrade,
        )
    screen.result(value, output, _render)


def _render(value: Mapping[str, Any]) -> None:
    if "gap" in value:
        screen.text(screen.gap(value["gap"]) if value["gap"] else "nothing differs from what was captured")
    render(value)
