"""What a crash or a kill has left for a moment keeps nobody from starting: a lock of a postmaster, a mount."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgcdp import api, proc
from pgcdp.capture import volumes
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet
from tests.waiting import wait_until


@contextmanager
def zombie() -> Iterator[int]:
    """A process of the user postgres that has ended and is collected at the end only."""
    user = postgres_user()
    with subprocess.Popen(["true"], user=user.uid, group=user.gid, extra_groups=[]) as child:
        wait_until(lambda: not proc.exists(child.pid), what="a zombie")
        yield child.pid


def test_a_socket_lock_whose_postmaster_pid_was_lost_does_not_keep_postgres_down(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """The capture was killed with Postgres: postmaster.pid was not durable yet, the socket's lock lies elsewhere."""
    found = make_set(binaries_of(15), size=256 << 20)
    facts, user = found.config.cluster, postgres_user()
    api.down(found.name)
    lock = Path(facts.socket_directory) / f".s.PGSQL.{facts.port}.lock"
    with zombie() as pid:
        lock.write_text(f"{pid}\n{found.pgdata}\n1\n{facts.port}\n{facts.socket_directory}\n")
        os.chown(lock, user.uid, user.gid)
        found.up()
        assert found.sql("select 1") == [(1,)]


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_mount_that_a_killed_command_had_begun_ends_in_between(
    make_set: MakeSet, binaries_of: BindirOf, fs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has the second one wait for the first, and then says that it is mounted already."""
    found = make_set(binaries_of(15), fs=fs, size=384 << 20)
    api.down(found.name)
    own = volumes.mount

    def twice(device: Path, mountpoint: Path, fs: str) -> None:
        own(device, mountpoint, fs)
        own(device, mountpoint, fs)

    monkeypatch.setattr(volumes, "mount", twice)
    found.up()
    assert len([each for each in volumes.mounts() if each.mountpoint == found.pgdata]) == 1
    assert found.sql("select 1") == [(1,)]
    monkeypatch.undo()
    api.down(found.name)
    found.assert_volume_is_newest()
