"""Clients that survive the death of their server: each commit that was acknowledged to them is noted outside.

A transaction is pgbench's own (four tables whose sums must agree) with a row of a ledger. A client that loses its
connection tries again until there is a server; what was not acknowledged may be there or not.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol

import psycopg

from tests.load import Connectable
from tests.waiting import wait_until

_LEDGER = "create table if not exists survivor (client int, counter bigint, filler text, primary key (client, counter))"
_SUMS = " union all ".join(
    f"select coalesce(sum({column}), 0) from pgbench_{table}"
    for table, column in (
        ("accounts", "abalance"), ("branches", "bbalance"), ("tellers", "tbalance"), ("history", "delta"),
    )
)  # fmt: skip


class Cluster(Protocol):
    """What the clients connect to."""

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]: ...

    def capturing(self) -> bool:
        """Whether a capture process serves its volumes."""


class Survivors:
    """`clients` threads from entering the context to its end, except between `pause` and `resume`.

    `errors`: what the clients were told by the server or its end, and went on after.
    """

    def __init__(self, cluster: Cluster, *, clients: int, seed: int, filler: int = 200) -> None:
        self._cluster = cluster
        self._seed = seed
        self._filler = filler
        self._acks: list[tuple[int, int]] = []
        self._strange: list[str] = []
        self.clients = clients
        self.errors: list[str] = []
        self._end = threading.Event()
        self._go = threading.Event()
        self._busy = 0
        self._resumed = 0
        self._count = threading.Lock()
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)]

    def __enter__(self) -> Survivors:
        with self._cluster.connect() as connection:
            connection.execute(_LEDGER)
        self._go.set()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._go.set()
        for thread in self._threads:
            thread.join(30)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a client does not end"
            assert not self._strange, self._strange

    def acknowledged(self) -> int:
        """Commits acknowledged so far."""
        return len(self._acks)

    def wait_for(self, count: int, timeout: float = 120) -> None:
        """Until so many more commits are acknowledged."""
        goal = self.acknowledged() + count
        wait_until(lambda: self.acknowledged() >= goal, timeout=timeout, interval=0.002, what=f"{count} commits")

    def pause(self) -> None:
        """Send nothing more, once what is on its way was answered or failed."""
        self._go.clear()
        wait_until(lambda: self._busy == 0, timeout=120, what="quiet clients")

    def resume(self) -> None:
        """Go on, over new connections: the server may have been stopped meanwhile, which is no client's business."""
        self._resumed += 1
        self._go.set()

    def assert_kept(self, cluster: Connectable) -> None:
        """Every commit acknowledged up to now is there once, and pgbench's sums agree."""
        acks = list(self._acks)
        with cluster.connect() as connection:
            held = set(connection.execute("select client, counter from survivor").fetchall())
            sums = {int(row[0]) for row in connection.execute(_SUMS.encode())}
        lost = [ack for ack in acks if ack not in held]
        assert not lost, f"{len(lost)} of {len(acks)} acknowledged commits are lost, the first {lost[0]}"
        assert len(sums) == 1, f"pgbench's sums differ: {sums}"

    @contextmanager
    def _working(self) -> Iterator[bool]:
        """False when it is time to end. Counts those at work only while they may be."""
        while True:
            self._go.wait()
            with self._count:
                if self._go.is_set():
                    self._busy += 1
                    break
        try:
            yield not self._end.is_set()
        finally:
            with self._count:
                self._busy -= 1

    def _client(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        counter, since = 0, 0
        connection: psycopg.Connection[Any] | None = None
        while not self._end.is_set():
            with self._working() as more:
                if not more:
                    break
                if connection is not None and since != self._resumed:
                    connection.close()
                    connection = None
                since = self._resumed
                try:
                    connection = connection or self._cluster.connect()
                    counter += 1
                    self._transaction(connection, rng, number, counter)
                    self._acks.append((number, counter))
                    continue
                except (psycopg.OperationalError, psycopg.errors.InternalError_) as error:
                    self._note(error)
                except psycopg.Error as error:
                    if not self._dying_volume(error):
                        self._strange.append(f"client {number}: {error!r}")
                        break
            if connection is not None:
                with suppress(psycopg.Error):
                    connection.close()
                connection = None
            self._end.wait(0.02)
        if connection is not None:
            connection.close()

    def _note(self, error: psycopg.Error) -> None:
        """A deadlock or a full disk would not be the kill's doing."""
        self.errors.append(repr(error))
        if isinstance(error, psycopg.errors.DeadlockDetected | psycopg.errors.DiskFull):
            self._strange.append(repr(error))

    def _dying_volume(self, error: psycopg.Error) -> bool:
        """A page of two blocks, the first cached and the second not: the kernel gives half of it, and no error.

        Or the filesystem has given up already, which Postgres takes for a lack of privilege.
        """
        short = isinstance(error, psycopg.errors.DataCorrupted) and "read only 4096 of 8192 bytes" in str(error)
        ended = isinstance(error, psycopg.errors.InsufficientPrivilege) and "Read-only file system" in str(error)
        return (short or ended) and not self._cluster.capturing()

    def _transaction(self, connection: psycopg.Connection[Any], rng: random.Random, client: int, counter: int) -> None:
        account, teller, branch = rng.randint(1, 200_000), rng.randint(1, 20), rng.randint(1, 2)
        delta = rng.randint(-5000, 5000)
        with connection.transaction():
            connection.execute("update pgbench_accounts set abalance = abalance + %s where aid = %s", [delta, account])
            connection.execute("update pgbench_tellers set tbalance = tbalance + %s where tid = %s", [delta, teller])
            connection.execute("update pgbench_branches set bbalance = bbalance + %s where bid = %s", [delta, branch])
            connection.execute(
                "insert into pgbench_history (tid, bid, aid, delta, mtime) values (%s, %s, %s, %s, now())",
                [teller, branch, account, delta],
            )
            connection.execute("insert into survivor values (%s, %s, repeat('x', %s))", [client, counter, self._filler])
