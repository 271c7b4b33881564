"""A protected cluster on four volumes: on three disks and a file, of two filesystems, with two tablespaces.

pg_wal lies elsewhere, as a link; so do the tablespaces, one on ext4 and one on xfs. The disk of that one is itself a
file on an xfs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pgcdp import api
from pgcdp.capture.planning import Backing
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from tests.data_directory import configure, new_data_directory
from tests.fix_disks import MakeDisk
from tests.fix_postgres import postgres_user
from tests.fix_sets import MakeSet, ProtectedSet

MIB = 1 << 20
SPACES = ("fast", "slow")


def spread_set(
    make_set: MakeSet,
    make_disk: MakeDisk,
    binaries: Binaries,
    *,
    size: int = 256 * MIB,
    settings: dict[str, str] | None = None,
    allowed: list[str] | None = None,
    wal_inside: bool = False,
    **options: Any,
) -> ProtectedSet:
    """The set, capturing. The data directory's volume has `size` bytes, each other one 304 MiB.

    `wal_inside`: pg_wal is no link, its volume is mounted in the data directory.
    """
    found = make_set(binaries, protect=False, allowed=allowed or [])
    wal, fast, slow = make_disk(304 * MIB), make_disk(304 * MIB), make_disk(304 * MIB, host="xfs")
    _make_cluster(found, settings or {}, wal_inside)
    api.protect(
        found.name, found.pgdata, found.store, size=size, yes=True, wal_volume=wal, bindir=binaries.directory,
        tablespaces=(("fast", Backing(fast, None)), ("slow", Backing(slow, None))), fs_of=(("slow", "xfs"),),
        **{"journal_limit": 2 << 30, **options},
    )  # fmt: skip
    return found


def place_of(found: ProtectedSet, name: str) -> Path:
    """Where pg_wal ("wal") or a tablespace lies."""
    return found.root / "elsewhere" / name


def _make_cluster(found: ProtectedSet, settings: dict[str, str], wal_inside: bool) -> None:
    user = postgres_user()
    for place in (place_of(found, name) for name in ("", "wal", *SPACES)):
        place.mkdir(mode=0o700)
        os.chown(place, user.uid, user.gid)
    waldir = () if wal_inside else (f"--waldir={place_of(found, 'wal')}",)
    new_data_directory(found.binaries, found.pgdata, *waldir)
    configure(found.pgdata, found.place(settings))
    cluster.start(cluster.command_line(found.binaries, found.pgdata), found.pgdata, user, found.root / "postgres.log")
    for name in SPACES:
        found.sql(f"create tablespace {name} location '{place_of(found, name)}'")
