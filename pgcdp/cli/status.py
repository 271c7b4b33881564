"""pgcdp status"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.horizon import Rate, in_words
from pgcdp.units import format_duration, format_size


@click.command(epilog=options.examples("pgcdp status", "pgcdp status main --output json"))
@options.set_argument()
@options.output_option
def command(set_name: str | None, output: str) -> None:
    """State, lag, journal, newest boundary and recovery window."""
    from pgcdp import api

    screen.result(api.status(options.pick_set(set_name)), output, render)


def render(value: Mapping[str, Any]) -> None:
    """The state of a set; also what protect, up and down print."""
    journal = value["journal"]
    names = ("set", "dsn", "state", "last_write", "durable_write", "stored_write", "intervals")
    lines = [(screen.label(name), screen.value_text(name, value[name])) for name in names]
    if value["postgres"] == "stopped":
        lines.insert(3, ("postgres", f"stopped; pgcdp up {value['set']} starts it"))
    if value.get("error"):
        lines.append(("error", str(value["error"])))
    if (value.get("agent") or {}).get("waiting"):
        lines.append(("waiting", value["agent"]["waiting"]))
    if value["tracked"]:
        lines.append(("TRACKING", tracked(value["tracked"])))
    kept = value["held"]
    if kept["restarts"]:
        lines.append(("capture restarts", f"{kept['restarts']}, {kept['resent']} requests were sent again"))
    if kept["problem"]:
        lines.append(("NOT KEPT", kept["problem"]))
    for each in value.get("outside") or ():
        lines.append(("NOT CAPTURED", f"{each['name']} in {each['place']}, outside of the set; see pgcdp check"))
    if value["lag_seconds"] is not None:
        lines.append(("lag", format_duration(value["lag_seconds"])))
    lines.append(("journal", f"{format_size(journal['bytes'])} of {format_size(journal['limit'])}"))
    lines += until_full(value["until_full"])
    if (value.get("scrub") or {}).get("damages"):
        lines.append(
            ("DAMAGED", f"{value['scrub']['damages']} places in the store; pgcdp info names them and what is lost")
        )
    if (value.get("scrub") or {}).get("age_seconds") is not None:
        lines.append(
            ("scrub", f"every part of the store was read in the last {format_duration(value['scrub']['age_seconds'])}")
        )
    lines.append(("recovery window", window(value["recovery_window"])))
    screen.pairs(lines)
    if value["volumes"]:
        screen.text()
        columns = ["name", "device", "mountpoint", "bytes", "backing"]
        screen.table(
            [screen.label(column) for column in columns],
            [[screen.value_text(column, row[column]) for column in columns] for row in value["volumes"]],
        )


def tracked(value: Mapping[str, Any]) -> str:
    """What the journal lacks, in one line."""
    doing = "they are brought in now" if value["healing"] else "production runs on"
    return (
        f"{value['blocks']} blocks changed behind write {value['behind_write']}, since {value['since']}, are missing "
        f"in the journal; {doing}: no point is there until the set has healed"
    )


SOON = 90 * 86400
"""What is full later than that is not told in the text."""


def until_full(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines about what gets full, and when."""
    lines = []
    journal = value["journal"]
    if journal is not None and journal["seconds"] is not None:
        lines.append(("journal full", f"{_when(journal)}, if the store took nothing any more"))
    rows = [("store full", value["store"]), *((f"volume {each['name']} full", each) for each in value["volumes"])]
    lines += [
        (label, _when(each))
        for label, each in rows
        if each is not None and each["seconds"] is not None and each["seconds"] < SOON
    ]
    return lines


def _when(each: Mapping[str, Any]) -> str:
    if not each["room"]:
        return "now"
    rate = Rate(each["bytes_per_second"], each["over_seconds"])
    return f"in {in_words(each['seconds'])} at the present rate ({rate})"


def window(value: Mapping[str, Any] | None) -> str:
    """A recovery window in one line."""
    if value is None or value.get("from_write") is None:
        return "nothing yet: the first boundary after the baseline opens it"
    return f"{value['from_time']} (write {value['from_write']}) to {value['to_time']} (write {value['to_write']})"
