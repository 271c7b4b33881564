"""pgcdp expire"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.setting_values import exact_period
from pgcdp.units import exact_size, format_size


@click.command(epilog=options.examples("pgcdp expire --dry-run", "pgcdp expire main --yes"))
@options.set_argument()
@click.option("--dry-run", is_flag=True, help="Show what would go, and do nothing.")
@options.yes_option
@options.output_option
def command(set_name: str | None, dry_run: bool, yes: bool, output: str) -> None:
    """Let go of what is older than the settings say: keep_writes, keep_boundaries, keep_hourly, keep_daily, least_free.

    By default everything is kept. What would go is shown and asked about first. Single writes go before boundaries do;
    then the boundaries between the newest ones of each hour and day; then what is oldest. What never goes: marks set
    with pgcdp mark --keep, the points of open clones, the newest verified boundary, the newest interval.

    The agent does the same by itself when one of the settings is set.
    """
    from pgcdp import api

    name = options.pick_set(set_name)
    if dry_run:
        screen.result(api.expire_look(name), output, _render)
        return

    def agree(told: Mapping[str, Any]) -> None:
        if not _goes(told):
            return
        if output == "text":
            for line in _lines(told):
                screen.note(line)
        options.confirm(f"this will be let go of for good, in set {name}", yes, output)

    with screen.progress(output) as progress:
        value = api.expire(name, agree=agree, progress=progress)
    screen.result(value, output, _render)


def _goes(told: Mapping[str, Any]) -> bool:
    return bool(told["oldest"] or told["joined"] or told["thinned"])


def _render(value: Mapping[str, Any]) -> None:
    would = value["dry_run"]
    policy = value["policy"]
    words = [f"{name} {exact_period(policy[name])}" for name in policy if name != "least_free"]
    screen.text(f"settings: {', '.join(words)}, least_free {exact_size(policy['least_free'])}")
    for line in _lines(value):
        screen.text(line)
    for each in value["kept"]:
        screen.text(f'kept: mark "{each["name"]}", write {each["write"]}')
    for each in value["views"]:
        screen.text(f"kept: write {each['write']}, of an open view")
    size = format_size(value["bytes"])
    screen.text(f"about {size} would come back, or more" if would else f"{size} came back")
    if value["waiting"]:
        screen.text(f"some of it will come back later: {value['waiting']}")
    for line in value["failed"]:
        screen.text(f"warning: {line}")


def _lines(value: Mapping[str, Any]) -> list[str]:
    """What goes, in words."""
    if not _goes(value):
        return ["nothing to let go of"]
    found = []
    if value["oldest"]:
        number, when = value["oldest"]["boundary"], value["oldest"]["time"]
        found.append(f"all before boundary {number} ({when}) goes: that is the oldest point then")
    if value["boundaries"]:
        found.append(f"boundaries that go: {_numbers(value['boundaries'])}")
    for each in value["writes"]:
        writes = f"{each['from_write']} to {each['to_write']}, {each['from_time']} to {each['to_time']}"
        found.append(f"single writes that go: {writes}")
    return found


def _numbers(numbers: Sequence[int]) -> str:
    """ "3, 5-9, 12"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
