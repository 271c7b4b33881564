"""The agent's session with Postgres, by asyncpg: the agent is asynchronous, and commands do without that library."""

from __future__ import annotations

from collections.abc import Awaitable, Generator
from typing import Any, TypeVar

import asyncpg

from pgcdp.errors import PreconditionError
from pgcdp.postgres.session import (
    DATABASES_SQL,
    HBA_KNOWN_SQL,
    HBA_SQL,
    SETTINGS_SQL,
    SUPERUSER_SQL,
    TABLESPACES_SQL,
    Database,
    Dsn,
    Settings,
    as_user,
    assembled,
    first_line,
    rules_in,
    unreachable,
)
from pgcdp.proc import User
from pgcdp.units import parse_lsn

T = TypeVar("T")
_CHECKPOINT_SQL = "select checkpoint_lsn::text from pg_control_checkpoint()"


class Session:
    """One at a time, opened again by the caller when it breaks."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, dsn: Dsn, database: str = "postgres", timeout: float = 10.0) -> Session:
        """Connect. Raises PreconditionError when Postgres cannot be reached."""
        opening = asyncpg.connect(
            host=str(dsn.socket_directory),
            port=dsn.port,
            user=dsn.role,
            database=database,
            timeout=timeout,
            server_settings={"application_name": "pgcdp agent"},
        )
        try:
            return cls(await _StepsAs(dsn.owner, opening))
        except (OSError, asyncpg.PostgresError, TimeoutError) as error:
            raise unreachable(dsn, error) from None

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return bool(self._connection.is_closed())

    async def checkpoint(self) -> None:
        """Run an immediate checkpoint and wait for its end. Raises PreconditionError when there was none."""
        await self._ask(self._connection.execute("checkpoint"))

    async def checkpoint_lsn(self) -> int:
        """Where the newest completed checkpoint's record begins, as pg_control says."""
        return parse_lsn(await self._ask(self._connection.fetchval(_CHECKPOINT_SQL)))

    async def lsn(self) -> int:
        """Where the next WAL record will be inserted."""
        return parse_lsn(await self._ask(self._connection.fetchval("select pg_current_wal_insert_lsn()::text")))

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a statement."""
        return [tuple(row) for row in await self._ask(self._connection.fetch(sql))]

    async def settings(self) -> Settings:
        """As `session.settings`."""
        rows = [dict(row) for row in await self._ask(self._connection.fetch(SETTINGS_SQL))]
        superuser = await self._ask(self._connection.fetchval(SUPERUSER_SQL))
        spaces = await self._ask(self._connection.fetch(TABLESPACES_SQL))
        known = await self._ask(self._connection.fetchval(HBA_KNOWN_SQL))
        hba = rules_in(await self._ask(self._connection.fetch(HBA_SQL))) if known else None
        return assembled(rows, superuser or "postgres", await self.databases(), [list(row) for row in spaces], hba)

    async def databases(self) -> list[Database]:
        """All databases, templates included, by OID."""
        return [Database(*row) for row in await self._ask(self._connection.fetch(DATABASES_SQL))]

    async def close(self, timeout: float = 5.0) -> None:
        """End the session; never fails."""
        try:
            await self._connection.close(timeout=timeout)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._connection.terminate()

    async def _ask(self, request: Awaitable[T]) -> T:
        try:
            return await request
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise PreconditionError(f"postgres did not do what pgcdp asked: {first_line(error)}") from None


class _StepsAs(Awaitable[T]):
    """Awaits something with each of its steps run by `as_user`; between the steps the event loop is itself."""

    def __init__(self, user: User | None, awaited: Awaitable[T]) -> None:
        self._user = user
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._awaited.__await__()
        value: Any = None
        failure: BaseException | None = None
        while True:
            try:
                with as_user(self._user):
                    waiting = steps.send(value) if failure is None else steps.throw(failure)
            except StopIteration as end:
                result: T = end.value
                return result
            value, failure = None, None
            try:
                value = yield waiting
            except BaseException as error:  # a cancellation belongs to what is awaited
                failure = error
