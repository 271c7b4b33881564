"""pgcdp info"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.cli.status import window
from pgcdp.units import format_size


@click.command(epilog=options.examples("pgcdp info", "pgcdp info --store /backup/main"))
@options.set_argument()
@options.store_option
@options.output_option
def command(set_name: str | None, store: Path | None, output: str) -> None:
    """Intervals, sizes, recovery window, what was verified."""
    from pgcdp import api

    screen.result(api.info(options.pick_set_or_store(set_name, store), store=store), output, _render)


def _render(value: Mapping[str, Any]) -> None:
    screen.pairs([("set", value["set"]), ("recovery window", window(value["recovery_window"]))])
    screen.text()
    intervals_table(value["intervals"])
    for each in value["damages"]:
        cost = "no point is lost" if each["lost"] is None else f"LOST: writes {_writes(each['lost'])}"
        screen.text(f"DAMAGED: {each['message']}: {cost}")
    lacking = [row for row in value["intervals"] if row["outside"]]
    for name, place in dict.fromkeys((each["name"], each["place"]) for row in lacking for each in row["outside"]):
        numbers = [int(row["number"]) for row in lacking if {"name": name, "place": place} in row["outside"]]
        screen.text(f"INCOMPLETE without {name} in {place}, outside of the set: interval {_ranges(numbers)}")
    unknown = [int(row["number"]) for row in value["intervals"] if row["outside"] is None]
    if unknown:
        screen.text(f"whether data lay outside of the set is not known: interval {_ranges(unknown)}")
    for each in value["gaps"] or ():
        screen.text(screen.gap(each))
    if value["gaps"] is None:
        screen.text("whether there are gaps behind the last boundary is not known")
    if value["marks"]:
        screen.text()
        rows = [
            [each["name"], each["kind"].replace("_", " "), str(each["write"]), each["lsn"] or "-", _kept(each)]
            for each in value["marks"]
        ]
        screen.table(["mark", "kind", "write", "lsn", "kept"], rows)
    if value["restarts"]:
        screen.text()
        for each in value["restarts"]:
            why = "had died" if each["why"] == "died" else "was upgraded"
            screen.text(f"capture {why}: another process after {each['seconds']:.3f} s ({each['time']})")
    if value["expired"]:
        screen.text()
        for each in value["expired"]:
            screen.text(_let_go(each))


def _let_go(event: Mapping[str, Any]) -> str:
    """In words: how much went, and who did it."""
    parts = [] if event["oldest"] is None else [f"all before boundary {event['oldest']}"]
    for name, what in (("joined", "joined: intervals"), ("thinned", "without single writes: intervals")):
        if event[name]:
            runs = (f"{e['first']}-{e['last']}" if e["first"] < e["last"] else str(e["first"]) for e in event[name])
            parts.append(f"{what} {', '.join(runs)}")
    return f"let go of by {event['by']} ({event['time']}): {'; '.join(parts)}"


def _kept(mark: Mapping[str, Any]) -> str:
    return "yes" if mark["kept"] else "-"


def _ranges(numbers: Sequence[int]) -> str:
    """ "3-7, 9" of 3, 4, 5, 6, 7 and 9."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def intervals_table(intervals: Sequence[Mapping[str, Any]]) -> None:
    """Intervals, each in a line."""
    rows = [
        [
            _numbers(row),
            f"{row['from_write']}-{row['to_write']}",
            str(row["to_time"]),
            _restores(row),
            str(row["reason"]),
            str(row["checkpoint_lsn"] or "-"),
            format_size(row["bytes_written"]),
            format_size(sum(row["stored"].values())),
            _verified(row["verified"]),
        ]
        for row in intervals
    ]
    screen.table(
        ["interval", "writes", "ends", "restores", "reason", "checkpoint", "written", "stored", "verified"], rows
    )


def _restores(row: Mapping[str, Any]) -> str:
    """What can be restored of an interval, in a word or two."""
    if not row.get("lost"):
        return "any write" if row["restorable_by_write"] else "boundaries"
    lost = row["lost"]
    if (lost[0]["from_write"], lost[0]["to_write"]) == (row["from_write"], row["to_write"]):
        return "NOTHING"
    if lost[-1]["to_write"] == row["to_write"]:
        return f"up to {lost[-1]['from_write'] - 1}"
    return f"all but {', '.join(_writes(each) for each in lost)}"


def _writes(lost: Mapping[str, Any]) -> str:
    first, last = lost["from_write"], lost["to_write"]
    if last is None:
        return f"{first} and behind"
    return str(first) if first == last else f"{first}-{last}"


def _numbers(row: Mapping[str, Any]) -> str:
    return f"{row['first']}-{row['number']}" if row["first"] < row["number"] else str(row["number"])


def _verified(value: Mapping[str, Any] | None) -> str:
    """How it ended, and to the minute when."""
    if value is None:
        return "-"
    return f"{'ok' if value['ok'] else 'FAILED'} {value['time'][:16]}Z"
