"""Writers of many bytes: each statement inserts a megabyte or so, and is noted when it was acknowledged."""

from __future__ import annotations

import threading
from types import TracebackType

import psycopg

from tests.survivors import Cluster
from tests.waiting import wait_until

_INSERT = "insert into {} select %s, %s, repeat(md5(n::text || %s), 30) from generate_series(1, 1000) n"
_ROWS = 1000


class Bulk:
    """`clients` writers from entering the context to its end. A client's own rows are thinned out now and then."""

    def __init__(self, cluster: Cluster, *, clients: int = 2, keep: int = 40, table: str = "bulk") -> None:
        self._cluster = cluster
        self._keep = keep
        self._table = table
        self._end = threading.Event()
        self.done = [0] * clients
        self._wrong: list[str] = []
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)]

    def __enter__(self) -> Bulk:
        with self._cluster.connect() as connection:
            connection.execute(f"create table if not exists {self._table} (client int, counter int, v text)".encode())
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(10 if error else 120)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads), "a writer does not end"
            assert not self._wrong, self._wrong

    def take_failures(self) -> list[str]:
        """Wait for the end of all writers; what ended them, which then counts no longer."""
        wait_until(lambda: not any(thread.is_alive() for thread in self._threads), what="the writers' end")
        found, self._wrong = self._wrong, []
        return found

    def statements(self) -> int:
        """Statements acknowledged so far."""
        return sum(self.done)

    def wait_for(self, count: int, timeout: float = 120) -> None:
        """Until so many more statements are acknowledged."""
        goal = self.statements() + count
        wait_until(lambda: self.statements() >= goal or bool(self._wrong), timeout=timeout, what=f"{count} statements")
        assert not self._wrong, self._wrong

    def assert_kept(self, cluster: Cluster) -> None:
        """The newest acknowledged rows of each writer are there, whole."""
        promised = list(self.done)
        with cluster.connect() as connection:
            found = connection.execute(
                f"select client, counter, count(*) from {self._table} group by 1, 2".encode()
            ).fetchall()
        held = {(client, counter): rows for client, counter, rows in found}
        for client, last in enumerate(promised):
            for counter in range(max(1, last // self._keep * self._keep + 1), last + 1):
                assert held.get((client, counter)) == _ROWS, f"statement {counter} of writer {client} is not there"

    def _client(self, number: int) -> None:
        try:
            with self._cluster.connect() as connection:
                counter = 0
                while not self._end.is_set():
                    counter += 1
                    connection.execute(_INSERT.format(self._table).encode(), [number, counter, str(counter)])
                    self.done[number] = counter
                    if counter % self._keep == 0:
                        connection.execute(f"delete from {self._table} where client = %s".encode(), [number])
                        connection.execute(f"vacuum {self._table}".encode())
        except psycopg.Error as error:
            self._wrong.append(f"writer {number}: {error}")
