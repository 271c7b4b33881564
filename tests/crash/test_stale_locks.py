"""A lock that a crash has left of a postmaster which init has not collected yet keeps nobody from starting."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgcdp import api, proc
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
