"""pgcdp check"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pgcdp import units
from pgcdp.cli import options, screen
from pgcdp.cli.verify import checks_table
from pgcdp.errors import DamageError, PreconditionError, UsageError


@click.command(
    epilog=options.examples(
        "pgcdp check",
        "pgcdp check main --full",
        "pgcdp check --pgdata /var/lib/postgresql/15/main --store /backup/main",
        "pgcdp check --store /backup/main --full --rate 100M",
    )
)
@options.set_argument()
@click.option(
    "--pgdata",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A cluster that is not protected yet, instead of SET.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A store instead of SET: nothing else is needed, on any machine. With --pgdata: where its store would lie.",
)
@options.key_options("Where the key of the store is, if it is encrypted")
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With --pgdata: where its journal would lie. Default: below /var/lib/pgcdp.",
)
@click.option("--full", is_flag=True, help="Also read all of the store and of the journal, and check every checksum.")
@click.option(
    "--rate",
    type=units.parse_size,
    metavar="SIZE",
    help="With --full: bytes of the store a second at most, 0: as fast as it goes. Default: scrub_rate of the set.",
)
@options.output_option
def command(
    set_name: str | None,
    pgdata: Path | None,
    store: Path | None,
    journal: Path | None,
    full: bool,
    rate: int | None,
    output: str,
) -> int:
    """Is everything as it must be?

    Settings, privileges, space, and with --full every stored byte. Exit code 5 when stored bytes are
    damaged, 6 when something else must be mended. A warning is no failure: the promise holds, but for what it says.
    With --pgdata: would the promise hold for that cluster? Nothing is changed.

    One with --full that was killed goes on where it was when it is run again. The agent does the same in the
    background (scrub_every); a check with --full takes its place meanwhile.
    """
    if pgdata is None and journal is not None:
        raise UsageError("--journal needs --pgdata", "a set has its places in its settings")
    if pgdata is not None and (set_name is not None or full):
        what = "--full" if set_name is None else f"the set {set_name}"
        raise UsageError(f"both --pgdata and {what} are given", "--pgdata is for a cluster that is not protected yet")
    from pgcdp import api

    if rate is not None and not full:
        raise UsageError("--rate needs --full", "without it hardly anything is read")
    store = None if store is None else store.absolute()
    name = None if pgdata is not None else options.pick_set_or_store(set_name, store)
    with screen.progress(output) as progress:
        if pgdata is not None:
            value = api.check_beforehand(
                pgdata.absolute(),
                store,
                None if journal is None else journal.absolute(),
                progress,
            )
        else:
            value = api.check(name, full=full, progress=progress, store=store, rate=rate)
    screen.result(value, output, _render)
    if value["ok"]:
        return 0
    damaged = any(not check["ok"] and check.get("kind") == DamageError.kind for check in value["checks"])
    return DamageError.exit_code if damaged else PreconditionError.exit_code


def _render(value: Mapping[str, Any]) -> None:
    checks_table(value["checks"])
    for check in value["checks"]:
        if check.get("hint"):
            screen.text(f"{'hint' if not check['ok'] else 'to mend'}, {check['name']}: {check['hint']}")
