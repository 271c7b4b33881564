"""pgcdp check"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from pgcdp.cli import options, screen
from pgcdp.cli.verify import checks_table
from pgcdp.errors import DamageError, PreconditionError


@click.command(epilog=options.examples("pgcdp check", "pgcdp check main --full"))
@options.set_argument()
@click.option("--full", is_flag=True, help="Also read all of the store and of the journal, and check every checksum.")
@options.output_option
def command(set_name: str | None, full: bool, output: str) -> int:
    """Is everything as it must be?

    Settings, privileges, space, and with --full every stored byte. Exit code 5 when stored bytes are
    damaged, 6 when something else must be mended.
    """
    from pgcdp import api

    with screen.progress(output) as progress:
        value = api.check(options.pick_set(set_name), full=full, progress=progress)
    screen.result(value, output, _render)
    if value["ok"]:
        return 0
    damaged = any(not check["ok"] and check.get("kind") == DamageError.kind for check in value["checks"])
    return DamageError.exit_code if damaged else PreconditionError.exit_code


def _render(value: Mapping[str, Any]) -> None:
    checks_table(value["checks"])
    for check in value["checks"]:
        if not check["ok"] and check.get("hint"):
            screen.text(f"hint: {check['hint']}")
