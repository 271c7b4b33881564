"""Data directories of new clusters, and their settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pgcdp import proc
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from tests.scratch import scratch_directory

INITDB = ("--data-checksums", "--auth=trust", "--no-sync")
_new: dict[Path, Path] = {}


def new_data_directory(binaries: Binaries, pgdata: Path, *options: str) -> None:
    """What initdb makes, with checksums, at `pgdata`, which must not exist; `options` are more of initdb's.

    Without any it is a copy of what initdb made once for all tests of this process: it takes as long as many a test.
    """
    if options:
        _make(binaries, pgdata, *options)
        return
    if binaries.directory not in _new:
        place = scratch_directory("new")
        _make(binaries, place / "data")
        _new[binaries.directory] = place / "data"
    proc.run(["cp", "-a", str(_new[binaries.directory]), str(pgdata)])


def _make(binaries: Binaries, pgdata: Path, *options: str) -> None:
    user = proc.user_named("postgres")
    pgdata.mkdir(mode=0o700)
    os.chown(pgdata, user.uid, user.gid)
    cluster.initdb(binaries, pgdata, user, *INITDB, *options)


def remove_copied() -> None:
    """What `new_data_directory` made copies of."""
    while _new:
        shutil.rmtree(_new.popitem()[1].parent)


def configure(pgdata: Path, settings: Mapping[str, str]) -> None:
    """Append settings to postgresql.conf."""
    with (pgdata / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items())
