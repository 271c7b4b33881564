"""pgcdp verify"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pgcdp.background import end_with
from pgcdp.cli import options, screen
from pgcdp.cli.restore import announce, point
from pgcdp.errors import UsageError, VerificationFailed
from pgcdp.units import format_duration


@click.command(
    epilog=options.examples(
        "pgcdp verify",
        "pgcdp verify main --target-boundary 12 --sql /etc/pgcdp/assertions.sql",
        "pgcdp verify --sample 10",
        "pgcdp verify --every-boundary",
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
@click.option("--sample", type=click.IntRange(1), metavar="N", help="N writes chosen at random, instead of a target.")
@click.option(
    "--every-boundary",
    is_flag=True,
    help="The newest boundary, then each one as it is cut, until Ctrl-C, giving way to all other work.",
)
@click.option("--ends-with", type=int, hidden=True, help="For the agent, whose process id it is.")
@options.store_option
@options.output_option
def command(
    set_name: str | None,
    sql_file: Path | None,
    sample: int | None,
    every_boundary: bool,
    ends_with: int | None,
    store: Path | None,
    output: str,
    **given: Any,
) -> int:
    """Prove a recovery point by starting Postgres on it.

    It is opened in place, not copied, and Postgres started on it: crash recovery, page checksums where the cluster has
    them, pg_amcheck on every index, and your own assertions. Nothing outside the scratch place is touched. Without a
    target it is the newest write. Exit code 4 when a check fails. With --every-boundary it goes on behind a boundary
    that is not right, and --output json gives one object a line; the agent does the same with verify_boundaries = true
    in the set's settings. pgcdp info shows when each interval was proven.
    """
    from pgcdp import api

    target, before = options.pick_target(given)
    name = options.pick_set_or_store(set_name, store)
    several = (target.kind != "newest" or before is not None) + (sample is not None) + every_boundary
    if several > 1:
        raise UsageError("give one target, --sample or --every-boundary", "without any it is the newest write")
    if every_boundary:
        if name is None:
            raise UsageError("--every-boundary needs a set: nothing is cut in a store alone", "name the set")
        if ends_with is not None:
            end_with(ends_with)
        return _each(name, sql_file, output)
    if sample is not None:
        with screen.progress(output) as progress:
            value = api.verify_sample(name, sample, sql_file=sql_file, store=store, progress=progress)
        screen.result(value, output, _render)
        return 0 if value["ok"] else VerificationFailed.exit_code
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


def _each(name: str, sql_file: Path | None, output: str) -> int:
    """Until it is interrupted."""
    from pgcdp import api

    with screen.progress(output) as progress:
        for result in api.verify_boundaries(name, sql_file=sql_file, progress=progress):
            screen.result(result, output, _render_boundary)
    return 0


def _render_boundary(value: Mapping[str, Any]) -> None:
    if "not_proven" in value:
        screen.text(f"boundary {value['boundary']}: NOT PROVEN: {value['not_proven']}")
    else:
        _render({"results": [value]})


def _render(value: Mapping[str, Any]) -> None:
    for row in value["results"]:
        screen.text(f"{point(row)}: {'ok' if row['ok'] else 'FAILED'} in {format_duration(row['seconds'])}")
        checks_table(row["checks"])


def _result(check: Mapping[str, Any]) -> str:
    if not check["ok"]:
        return "FAILED"
    return "warning" if check.get("warning") else "ok"


def checks_table(checks: list[Mapping[str, Any]]) -> None:
    """Checks, each in a line."""
    screen.table(
        ["check", "result", "took", "detail"],
        [[check["name"], _result(check), format_duration(check["seconds"]), check["detail"] or ""] for check in checks],
    )
