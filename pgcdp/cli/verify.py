"""pgcdp verify"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.cli.restore import announce, point
from pgcdp.errors import VerificationFailed
from pgcdp.units import format_duration


@click.command(
    epilog=options.examples(
        "pgcdp verify",
        "pgcdp verify main --target-boundary 12 --sql /etc/pgcdp/assertions.sql",
        "pgcdp verify --store /backup/main --target-write 48213 --output json",
    )
)
@options.set_argument()
@options.target_options
@click.option(
    "--sql",
    "sql_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Assertions of your own: a query passes when it returns no row, or a single true.",
)
@options.store_option
@options.output_option
def command(
    set_name: str | None,
    sql_file: Path | None,
    store: Path | None,
    output: str,
    **given: Any,
) -> int:
    """Prove a recovery point by starting Postgres on it.

    It is opened in place, not copied, and Postgres started on it: crash recovery, page checksums where the cluster has
    them, pg_amcheck on every index, and your own assertions. Nothing outside the scratch place is touched. Without a
    target it is the newest write. Exit code 4 when a check fails.
    """
    from pgcdp import api

    target, before = options.pick_target(given)
    name = options.pick_set_or_store(set_name, store)
    with screen.progress(output) as progress:
        value = api.verify(
            name,
            target,
            sql_file=sql_file,
            store=store,
            before=before,
            announce=announce if output == "text" else None,
            progress=progress,
        )
    screen.result(value, output, _render)
    return 0 if value["ok"] else VerificationFailed.exit_code


def _render(value: Mapping[str, Any]) -> None:
    for row in value["results"]:
        screen.text(f"{point(row)}: {'ok' if row['ok'] else 'FAILED'} in {format_duration(row['seconds'])}")
        checks_table(row["checks"])


def checks_table(checks: list[Mapping[str, Any]]) -> None:
    """Checks, each in a line."""
    screen.table(
        ["check", "result", "took", "detail"],
        [
            [check["name"], "ok" if check["ok"] else "FAILED", format_duration(check["seconds"]), check["detail"] or ""]
            for check in checks
        ],
    )
