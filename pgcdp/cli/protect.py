"""pgcdp protect"""

from __future__ import annotations

from pathlib import Path

import click

from pgcdp import units
from pgcdp.cli import options, screen
from pgcdp.cli.status import render
from pgcdp.errors import UsageError


@click.command(
    epilog=options.examples(
        "pgcdp protect main --pgdata /var/lib/postgresql/15/main --store /backup/main --size 20G",
        "pgcdp protect main --pgdata /srv/pg --store /backup/main --volume /dev/vg0/pg --fs xfs",
        "pgcdp protect new --pgdata /srv/new --store /backup/new --size 5G --initdb --port 5433 --cut 1min --cut 256M",
    )
)
@options.set_argument(required=True)
@click.option(
    "--pgdata",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Data directory of the cluster. It keeps this path.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Where backup images and intervals are kept; best on other disks than the cluster's.",
)
@click.option("--volume", type=click.Path(path_type=Path), metavar="DEV", help="Block device to take as the volume.")
@click.option("--size", type=units.parse_size, metavar="SIZE", help="Or make it: a file of this size, fully allocated.")
@click.option("--fs", type=click.Choice(["ext4", "xfs"]), default="ext4", show_default=True, help="Its filesystem.")
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the journal of captured writes lies. Default: below /var/lib/pgcdp/SET.",
)
@click.option(
    "--journal-limit", type=units.parse_size, metavar="SIZE", help="Most bytes that the journal may take. Default: 16G."
)
@click.option(
    "--cut",
    multiple=True,
    metavar="WHEN",
    help="When to close an interval: checkpoint (with Postgres's own), a period (5min), a quantity of writes (1G), "
    "or rate (more often the more is written). May be given several times. Default: checkpoint, 5min and 1G.",
)
@click.option(
    "--initdb",
    is_flag=True,
    help="Make a new cluster in DIR, which must not exist or be empty; user "
    "postgres of the system gets in through the socket without a password (peer), over TCP all need one (scram).",
)
@click.option("--port", type=click.IntRange(1, 65535), metavar="P", help="With --initdb: its port. Default: 5432.")
@options.yes_option
@options.output_option
def command(
    set_name: str,
    pgdata: Path,
    store: Path,
    volume: Path | None,
    size: int | None,
    fs: str,
    journal: Path | None,
    journal_limit: int | None,
    cut: tuple[str, ...],
    initdb: bool,
    port: int | None,
    yes: bool,
    output: str,
) -> None:
    """Put a cluster behind the capture layer.

    From then on every write of it can be restored. The cluster is stopped, its data directory moves to a volume that
    is mounted at the same path, and it is started again as it ran before. If any step fails, all is put back. The
    settings are written to SET.toml, where every one can be changed later.
    """
    from pgcdp import api

    if volume is not None and size is not None:
        raise UsageError("--volume and --size cannot be given together", "a block device has a size of its own")
    if port is not None and not initdb:
        raise UsageError("--port needs --initdb", "a cluster that is there has its port in its postgresql.conf")
    if initdb:
        question = f"a new cluster will be made in {pgdata}, on a volume of its own"
    else:
        question = f"the cluster in {pgdata} will be stopped and moved to a volume of its own"
    if volume is not None:
        question += f"; everything on {volume} will be lost"
    options.confirm(question, yes, output)
    with screen.progress(output) as progress:
        value = api.protect(
            set_name,
            pgdata.absolute(),
            store.absolute(),
            volume=volume,
            size=size,
            fs=fs,
            journal=None if journal is None else journal.absolute(),
            journal_limit=journal_limit,
            cut=cut,
            initdb=initdb,
            settings=() if port is None else (("port", str(port)),),
            yes=True,
            progress=progress,
        )
    screen.result(value, output, render)
