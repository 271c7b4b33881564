"""pgcdp protect"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pgcdp import units
from pgcdp.cli import options, screen
from pgcdp.cli.status import render
from pgcdp.errors import UsageError
from pgcdp.sets import list_sets


def backing(text: str) -> tuple[Path | None, int | None]:
    """A block device, or a size. Raises UsageError."""
    if text.startswith("/"):
        return Path(text), None
    try:
        return None, units.parse_size(text)
    except UsageError:
        raise UsageError(
            f'"{text}" is neither a block device nor a size', "give /dev/NAME or a size such as 20G"
        ) from None


def tablespace(text: str) -> tuple[str, tuple[Path | None, int | None]]:
    """NAME=DEV|SIZE. Raises UsageError."""
    name, equals, what = text.rpartition("=")
    if not equals or not name:
        raise UsageError(f'"{text}" names no tablespace and its volume', "give NAME=/dev/NAME or NAME=20G")
    return name, backing(what)


def filesystem(text: str) -> tuple[str, str]:
    """Of which volume ("" for all), and which filesystem. Raises UsageError."""
    volume, equals, fs = text.rpartition("=")
    if fs not in ("ext4", "xfs") or (equals and not volume):
        raise UsageError(f'"{text}" is no filesystem', "give ext4 or xfs, for one of several volumes VOLUME=xfs")
    return volume, fs


@click.command(
    epilog=options.examples(
        "pgcdp protect main --pgdata /var/lib/postgresql/15/main --store /backup/main --size 20G",
        "pgcdp protect main --pgdata /srv/pg --store /backup/main --volume /dev/vg0/pg --fs xfs",
        "pgcdp protect main --pgdata /srv/pg --store /backup/main --size 20G --wal-volume /dev/vg1/wal "
        "--tablespace fast=/dev/nvme1n1 --tablespace archive=200G --fs archive=xfs",
        "pgcdp protect main --tablespace late=50G",
        "pgcdp protect new --pgdata /srv/new --store /backup/new --size 5G --initdb --port 5433 --cut 1min --cut 256M",
    )
)
@options.set_argument(required=True)
@click.option(
    "--pgdata",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Data directory of the cluster. It keeps this path.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where backup images and intervals are kept; best on other disks than the cluster's.",
)
@click.option("--volume", type=click.Path(path_type=Path), metavar="DEV", help="Block device to take as the volume.")
@click.option("--size", type=units.parse_size, metavar="SIZE", help="Or make it: a file of this size, fully allocated.")
@click.option(
    "--wal-volume",
    type=backing,
    metavar="DEV|SIZE",
    help="A volume of its own for pg_wal: a block device, or a file of this size. It is mounted where pg_wal lies, in "
    "DIR or elsewhere.",
)
@click.option(
    "--tablespace",
    "tablespaces",
    type=tablespace,
    multiple=True,
    metavar="NAME=DEV|SIZE",
    help="The same for a tablespace, by name or OID; it keeps its path. Each one outside DIR must be named.",
)
@click.option(
    "--fs",
    type=filesystem,
    multiple=True,
    metavar="[VOLUME=]ext4|xfs",
    help="Filesystem of the volumes, or of one: data, wal, or the name of a tablespace. Default: ext4.",
)
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
@click.option(
    "--encrypt-key-file",
    type=click.Path(path_type=Path, resolve_path=True),
    metavar="FILE",
    help="Encrypt the store with the key in FILE: 64 hex digits, which only root may read. Without it nothing can be "
    "restored, so keep a copy of it elsewhere, and not in the store.",
)
@click.option("--encrypt-key-command", metavar="CMD", help="Or with the key that a command of the shell prints.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="P", help="With --initdb: its port. Default: 5432.")
@options.yes_option
@options.output_option
def command(
    set_name: str,
    pgdata: Path | None,
    store: Path | None,
    volume: Path | None,
    size: int | None,
    wal_volume: tuple[Path | None, int | None] | None,
    tablespaces: tuple[tuple[str, tuple[Path | None, int | None]], ...],
    fs: tuple[tuple[str, str], ...],
    journal: Path | None,
    journal_limit: int | None,
    cut: tuple[str, ...],
    initdb: bool,
    encrypt_key_file: Path | None,
    encrypt_key_command: str | None,
    port: int | None,
    yes: bool,
    output: str,
) -> None:
    """Put a cluster behind the capture layer.

    From then on every write of it can be restored. The cluster is stopped, its data directory moves to a volume that
    is mounted at the same path, and it is started again as it ran before. If any step fails, all is put back. The
    settings are written to SET.toml, where every one can be changed later.

    pg_wal and tablespaces can have volumes of their own, on any disks; all volumes share one write order. Of a set that
    is protected already, --tablespace alone takes a new tablespace in; the cluster is stopped while that is copied.
    """
    from pgcdp import api
    from pgcdp.capture.planning import Backing

    if pgdata is None and store is None and tablespaces and set_name in list_sets():
        given = {"--volume": volume, "--size": size, "--wal-volume": wal_volume, "--journal": journal,
                 "--journal-limit": journal_limit, "--cut": cut or None, "--initdb": initdb or None,
                 "--encrypt-key-file": encrypt_key_file, "--encrypt-key-command": encrypt_key_command}  # fmt: skip
        _take_in(set_name, tablespaces, fs, [name for name, value in given.items() if value is not None], yes, output)
        return
    if pgdata is None or store is None:
        missing = "--pgdata" if pgdata is None else "--store"
        raise UsageError(f"missing option {missing}", "only a set that is protected can be given a --tablespace alone")
    if volume is not None and size is not None:
        raise UsageError("--volume and --size cannot be given together", "a block device has a size of its own")
    if port is not None and not initdb:
        raise UsageError("--port needs --initdb", "a cluster that is there has its port in its postgresql.conf")
    if initdb:
        question = f"a new cluster will be made in {pgdata}, on a volume of its own"
    else:
        question = f"the cluster in {pgdata} will be stopped and moved to a volume of its own"
    wal_device, wal_size = wal_volume or (None, None)
    devices = [volume, wal_device, *(device for _, (device, _) in tablespaces)]
    lost = [str(device) for device in devices if device is not None]
    if lost:
        question += f"; everything on {' and '.join(lost)} will be lost"
    options.confirm(question, yes, output)
    with screen.progress(output) as progress:
        value = api.protect(
            set_name,
            pgdata.absolute(),
            store.absolute(),
            volume=volume,
            size=size,
            wal_volume=wal_device,
            wal_size=wal_size,
            tablespaces=tuple((name, Backing(*what)) for name, what in tablespaces),
            fs=dict(fs).get("", "ext4"),
            fs_of=tuple((name, what) for name, what in fs if name),
            journal=None if journal is None else journal.absolute(),
            journal_limit=journal_limit,
            cut=cut,
            initdb=initdb,
            encrypt_key_file=encrypt_key_file,
            encrypt_key_command=encrypt_key_command,
            settings=() if port is None else (("port", str(port)),),
            yes=True,
            progress=progress,
        )
    screen.result(value, output, _render)


def _render(value: Mapping[str, Any]) -> None:
    render(value)
    for warning in value["warnings"]:
        screen.text(f"warning, {warning['name']}: {warning['detail']}; {warning['hint']}")


def _take_in(
    set_name: str,
    tablespaces: tuple[tuple[str, tuple[Path | None, int | None]], ...],
    fs: tuple[tuple[str, str], ...],
    others: list[str],
    yes: bool,
    output: str,
) -> None:
    """Tablespaces for a set that is protected."""
    from pgcdp import api
    from pgcdp.capture.planning import Backing

    if others:
        raise UsageError(
            f"the set {set_name} is protected already: {others[0]} cannot be given", "give --tablespace alone"
        )
    if any(name for name, _ in fs):
        raise UsageError("--fs is that of all new volumes here", "give --fs ext4 or --fs xfs")
    names = ", ".join(name for name, _ in tablespaces)
    question = f"the cluster of {set_name} will be stopped while tablespace {names} moves to a volume of its own"
    lost = [str(device) for _, (device, _) in tablespaces if device is not None]
    if lost:
        question += f"; everything on {' and '.join(lost)} will be lost"
    options.confirm(question, yes, output)
    with screen.progress(output) as progress:
        value = api.add_tablespaces(
            set_name,
            [(name, Backing(*what)) for name, what in tablespaces],
            fs=dict(fs).get(""),
            yes=True,
            progress=progress,
        )
    screen.result(value, output, render)
