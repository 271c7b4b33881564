"""pgcdp clones"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.cli.restore import point
from pgcdp.units import format_size


@click.command(epilog=options.examples("pgcdp clones", "pgcdp clones --output json"))
@options.output_option
def command(output: str) -> None:
    """List the clones of all sets: where they stand, and how to connect to them."""
    from pgcdp import api

    screen.result(api.clones(), output, _render)


def _render(value: Mapping[str, Any]) -> None:
    rows = value["clones"]
    if not rows:
        screen.text("there are no clones; pgcdp clone makes one")
        return
    screen.table(
        ["clone", "set", "state", "recovery point", "expires", "written", "memory"],
        [
            [
                row["name"],
                row["set"] or row["store"] or "unknown",
                row["state"],
                point(row) if row["recovery_point"] else "unknown",
                row["expires"] or ("never" if row["created"] else "unknown"),
                format_size(row["written_bytes"]),
                format_size(row["memory_bytes"]),
            ]
            for row in rows
        ],
    )
    for row in rows:
        if row["problem"] and row["state"] != "damaged":
            screen.text(f"{row['name']}: {row['problem']}")
        if row["state"] == "running":
            screen.text(f'{row["name"]}: psql "{row["dsn"]}"')
        elif row["state"] in ("dead", "stopped"):
            screen.text(f"{row['name']} does not run any more: pgcdp destroy {row['name']}")
        elif row["state"] == "damaged":
            screen.text(f"{row['name']}: {row['problem']}; it can only be taken away: pgcdp destroy {row['name']}")
