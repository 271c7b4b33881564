"""The agent's session with Postgres, by asyncpg: the agent is asynchronous, and commands do without that library."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Generator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar

import asyncpg

from pgcdp.errors import PreconditionError
from pgcdp.postgres.session import (
    ALL_RIGHTS_SQL,
    DATABASES_SQL,
    HBA_KNOWN_SQL,
    HBA_SQL,
    IN_FILES_KNOWN_SQL,
    IN_FILES_SQL,
    LEAST_SQL,
    OPTIONS,
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
_BROKEN = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a connection raises that Postgres refuses or leaves; TimeoutError is an OSError."""
_NOT_RUNNING = (FileNotFoundError, ConnectionRefusedError, asyncpg.CannotConnectNowError)


class NotRunning(PreconditionError):
    """Postgres lets nobody in: it does not run, or is being started or stopped."""


class Session:
    """One at a time, opened again by the caller when it breaks. It has the least rights but where these do not do."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._may_checkpoint = False

    @classmethod
    async def open(cls, dsn: Dsn, database: str = "postgres", timeout: float = 10.0) -> Session:
        """Connect. Raises PreconditionError when Postgres cannot be reached, NotRunning where that is known."""
        opening = asyncpg.connect(
            host=str(dsn.socket_directory),
            port=dsn.port,
            user=dsn.role,
            database=database,
            timeout=timeout,
            server_settings={"application_name": "pgcdp agent", **OPTIONS},
        )
        try:
            found = cls(await _StepsAs(dsn.owner, opening))
        except _NOT_RUNNING as error:
            told = unreachable(dsn, error)
            raise NotRunning(told.message, told.hint) from None
        except _BROKEN as error:
            raise unreachable(dsn, error) from None
        try:
            await asyncio.wait_for(found._with_least_rights(), timeout)
        except TimeoutError as error:
            found._connection.terminate()
            raise unreachable(dsn, error) from None
        except BaseException:
            found._connection.terminate()
            raise
        return found

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return bool(self._connection.is_closed())

    async def checkpoint(self) -> None:
        """Run an immediate checkpoint and wait for its end. Raises PreconditionError when there was none."""
        if self._may_checkpoint:
            await self._ask(self._connection.execute("checkpoint"))
            return
        async with self._all_rights():
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

    async def configuration_loaded(self) -> datetime:
        """When Postgres read its configuration last."""
        loaded: datetime = await self._ask(self._connection.fetchval("select pg_conf_load_time()"))
        return loaded

    async def settings(self) -> Settings:
        """As `session.settings`."""
        await self._with_least_rights()  # the role may be there since, or have lost something
        rows = [dict(row) for row in await self._ask(self._connection.fetch(SETTINGS_SQL))]
        superuser = await self._ask(self._connection.fetchval(SUPERUSER_SQL))
        spaces = await self._ask(self._connection.fetch(TABLESPACES_SQL))
        async with self._all_rights():  # to whom that view is granted, it shows secrets of LDAP, too
            known = await self._ask(self._connection.fetchval(HBA_KNOWN_SQL))
            hba = rules_in(await self._ask(self._connection.fetch(HBA_SQL))) if known else None
            if await self._ask(self._connection.fetchval(IN_FILES_KNOWN_SQL)):
                rows += [dict(row) for row in await self._ask(self._connection.fetch(IN_FILES_SQL))]
        return assembled(rows, superuser or "postgres", await self.databases(), [list(row) for row in spaces], hba)

    async def databases(self) -> list[Database]:
        """All databases, templates included, by OID."""
        return [Database(*row) for row in await self._ask(self._connection.fetch(DATABASES_SQL))]

    async def close(self, timeout: float = 5.0) -> None:
        """End the session; never fails."""
        try:
            await self._connection.close(timeout=timeout)
        except _BROKEN:
            self._connection.terminate()

    async def _with_least_rights(self) -> None:
        row = await self._ask(self._connection.fetchrow(LEAST_SQL))
        self._may_checkpoint = row is None or bool(row[1])

    @asynccontextmanager
    async def _all_rights(self) -> AsyncIterator[None]:
        """For a statement that only a superuser may run."""
        await self._ask(self._connection.execute(ALL_RIGHTS_SQL))
        try:
            yield
        except PreconditionError:
            with suppress(PreconditionError):  # the connection may be what failed
                await self._with_least_rights()
            raise
        except BaseException:  # nobody waits any longer: neither for this
            self._connection.terminate()
            raise
        await self._with_least_rights()

    async def _ask(self, request: Awaitable[T]) -> T:
        try:
            return await request
        except asyncpg.InternalClientError as error:  # what a backend said as it ended was taken for an answer
            raise PreconditionError(f"postgres has ended the connection: {first_line(error)}") from None
        except _BROKEN as error:
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
