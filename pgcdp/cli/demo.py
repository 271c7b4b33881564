"""pgcdp demo"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.cli.restore import point
from pgcdp.errors import VerificationFailed
from pgcdp.units import format_duration, format_size


@click.command(epilog=options.examples("pgcdp demo", "pgcdp demo --keep"))
@click.option("--keep", is_flag=True, help="Leave everything running afterwards, and say how to remove it.")
@options.output_option
def command(keep: bool, output: str) -> int:
    """All of it on a throw-away cluster, in about a minute.

    Makes a cluster in a directory of its own below /var/tmp, protects it, loads it, deletes rows by mistake, goes on
    loading. Then it finds the mistake, proves points around it by starting Postgres on them, restores, puts the rows
    back, opens a clone and steps it through the mistake, rewinds the cluster in place and undoes that. Leaves nothing
    behind; only when a step fails, its files and logs stay, and where they are is said.
    """
    from pgcdp import demo

    with screen.progress(output) as progress:
        value = demo.run(keep=keep, progress=progress)
    screen.result(value, output, _render)
    return 0 if value["ok"] else VerificationFailed.exit_code


def _render(value: Mapping[str, Any]) -> None:
    steps = value["steps"]
    screen.text()
    screen.table(
        ["step", "took", ""], [[step["name"], format_duration(step["seconds"]), step["detail"]] for step in steps]
    )
    screen.text()
    screen.table(
        ["proven", "", "paid orders", "recovery point"],
        [
            ["ok" if each["ok"] else "FAILED", each["name"], str(each["paid_orders"]), point(each)]
            for each in value["restores"]
        ],
    )
    captured = value["captured"]
    screen.text()
    screen.text(
        f"captured {captured['writes']} writes, {format_size(captured['bytes_written'])}, in {captured['intervals']} "
        f"intervals; stored in {format_size(captured['stored_bytes'])}"
    )
    screen.text(f"all of it took {format_duration(value['seconds'])}")
    screen.text()
    screen.text("to look further:")
    for line in value["next"]:
        screen.text(f"  {line}")
    if value["remove"]:
        screen.text(f"to remove it: {value['remove']}")
    else:
        screen.text("nothing of it is left on this machine")
