"""pgcdp clone"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pgcdp import units
from pgcdp.cli import options, screen
from pgcdp.cli.restore import announce_point, announce_sides
from pgcdp.errors import UsageError
from pgcdp.units import format_duration


@click.command(
    epilog=options.examples(
        "pgcdp clone",
        'pgcdp clone main --before "DELETE FROM orders" --name before-delete',
        "pgcdp clone main --target-boundary 12 --port 5433 --trust-local --ttl 2h",
        "pgcdp clone --store /backup/main --target-write 48213 --output json",
    )
)
@options.set_argument()
@options.target_options
@click.option("--name", metavar="N", help="Its name; without it SET-1, SET-2, ...")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="P",
    help="Listen on this port of 127.0.0.1, too; 0: any free one. Production's own pg_hba rules hold.",
)
@click.option("--trust-local", is_flag=True, help="With --port: no password for anybody on this machine.")
@click.option("--ttl", type=units.parse_duration, metavar="TIME", help="Destroy it after this time, such as 2h.")
@click.option("--read-only", is_flag=True, help="Sessions begin read-only.")
@options.store_option
@options.output_option
def command(
    set_name: str | None,
    name: str | None,
    port: int | None,
    trust_local: bool,
    ttl: float | None,
    read_only: bool,
    store: Path | None,
    output: str,
    **given: Any,
) -> None:
    """A running Postgres as it was at any captured write, or between any two commits.

    The recovery point is opened in place: nothing is copied, whatever the size. The clone accepts writes, which go to
    files of its own; neither production nor the store is touched, and it can reach nothing outside of itself. It
    stays until pgcdp destroy. Without a target it is the newest write.
    """
    from pgcdp import api
    from pgcdp.recovery.clone import Access

    if trust_local and port is None:
        raise UsageError("--trust-local needs --port", "its socket lets root and the cluster's owner in without it")
    target, before = options.pick_target(given)
    chosen = options.pick_set_or_store(set_name, store)
    with screen.progress(output) as progress:
        value = api.clone(
            chosen,
            target,
            name=name,
            access=Access(port, trust_local, read_only),
            ttl=ttl,
            store=store,
            before=before,
            announce=announce_point if output == "text" else None,
            progress=progress,
        )
    screen.result(value, output, render)


def render(value: Mapping[str, Any]) -> None:
    """Where a clone stands that runs, and what to type next."""
    announce_sides(value)
    replay = value["recovery"]
    line = f"clone {value['name']} runs after {format_duration(value['seconds'])}"
    if replay["from_lsn"] is not None:
        line += (
            f", {format_duration(replay['seconds'])} of it Postgres's own start and replay from {replay['from_lsn']}"
        )
    screen.text(line)
    if replay["defaults"]:
        screen.text(f"at Postgres's defaults, since it refuses production's here: {', '.join(replay['defaults'])}")
    screen.text(f'connect: psql "{value["dsn"]}"')
    screen.text(f"remove:  pgcdp destroy {value['name']}")
