"""What the agent asks of Postgres, which may be down, or wait itself for room that only the agent makes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar

from pgcdp import log
from pgcdp.config import Config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.intervals.indexing import newest_look
from pgcdp.intervals.stages import Stages
from pgcdp.postgres.agent_session import Session
from pgcdp.postgres.catalogs import look
from pgcdp.postgres.configuration_files import read_outside
from pgcdp.postgres.relations import Look
from pgcdp.postgres.session import Dsn, Settings
from pgcdp.proc import user_named

logger = log.get(__name__)
T = TypeVar("T")
InWorker = Callable[..., Awaitable[Any]]
"""Runs a function with its arguments in the thread that owns the stages."""

PATIENCE_SECONDS = 5.0
"""How long a step waits for Postgres, which may itself wait for a journal that only this agent can make room in."""
SETTINGS_SECONDS = 60.0
LOADED_SECONDS = 2.0
"""How often it is asked whether the configuration was loaded anew since the settings were asked for."""
AGAIN_SECONDS = 10.0
"""The same, when there was no answer."""
LOOK_SECONDS = 30.0
"""How long a look at the catalogs waits for each database; other work goes on meanwhile."""


class Questions:
    """One session, kept open; settings and catalogs as Postgres told them last."""

    def __init__(self, config: Config, in_worker: InWorker) -> None:
        self.settings: Settings = {}
        self.whole_look_at = time.monotonic()
        self.no_look = ""
        self._config = config
        self._in_worker = in_worker
        self._open: Session | None = None
        self._lock = asyncio.Lock()  # it answers one question at a time
        self._settings_at = self._looked_at = -SETTINGS_SECONDS
        self._loaded: datetime | None = None  # when the configuration was, behind which the settings were asked for
        self._loaded_again = 0.0  # when that is asked next
        self._looking: asyncio.Task[tuple[Look, dict[str, str]]] | None = None

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """The session, to oneself. Raises PreconditionError when Postgres cannot be reached."""
        async with self._lock:
            if self._open is None or self._open.closed:
                self._open = await Session.open(Dsn.of(self._config))
            yield self._open

    def ask_anew(self) -> None:
        """Settings and catalogs are others now: the next turn asks for them."""
        self._settings_at = self._looked_at = -SETTINGS_SECONDS

    async def refresh_settings(self, *, busy: bool) -> None:
        """Postgres may be down for a while: then the last known settings hold. `busy`: it has a checkpoint to run."""
        now = time.monotonic()
        due = now - self._settings_at >= SETTINGS_SECONDS
        if busy or (now < self._loaded_again and not due):
            return
        if due:
            self._settings_at = now
        self._loaded_again = now + LOADED_SECONDS
        try:
            loaded = await self._soon(self._read_loaded())
            if due or loaded != self._loaded:
                self.settings = await self._soon(self._read_settings())
                self._settings_at, self._loaded = now, loaded
        except PgcdpError:  # the loop has more to do than to wait for it, and Postgres's log than to tell of it
            waited = time.monotonic() - now >= PATIENCE_SECONDS
            self._loaded_again = now + (SETTINGS_SECONDS if waited else AGAIN_SECONDS)

    async def look(self, stages: Stages, *, busy: bool) -> None:
        """Keep the names of relations with the open interval; without a look, those of the last one hold."""
        if self._looking is None:
            if busy or time.monotonic() - self._looked_at < SETTINGS_SECONDS:
                return
            self._looking = asyncio.create_task(self._read_catalogs(stages))
            await asyncio.wait({self._looking}, timeout=PATIENCE_SECONDS)
        if not self._looking.done():
            return
        task, self._looking = self._looking, None
        self._looked_at = time.monotonic()
        try:
            found, failed = task.result()
        except PgcdpError as error:
            problem, level = error.message, logging.INFO  # Postgres may be down
        else:
            level = logging.WARNING
            problem = "; ".join(f"database {name}: {why}" for name, why in failed.items())
            await self._in_worker(stages.look, found, self.settings)
            if not failed:
                self.whole_look_at = self._looked_at
        if problem and problem != self.no_look:
            logger.log(level, "no look at the catalogs: %s", problem)
        self.no_look = problem

    async def newest_checkpoint(self) -> int:
        """Where the record of the newest one begins, as Postgres knows it."""
        async with self.session() as session:
            return await session.checkpoint_lsn()

    async def end_look(self) -> None:
        """Look no longer."""
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError, Exception):  # whatever it says, nobody waits for it any more
                await self._looking

    async def close(self) -> None:
        """End the session."""
        if self._open is not None:
            await self._open.close()

    async def _read_catalogs(self, stages: Stages) -> tuple[Look, dict[str, str]]:
        number = stages.newest.number if stages.newest is not None else 0
        before = await self._in_worker(newest_look, stages.store, number)
        return await look(Dsn.of(self._config), before, LOOK_SECONDS)

    async def _read_loaded(self) -> datetime:
        async with self.session() as session:
            return await session.configuration_loaded()

    async def _read_settings(self) -> Settings:
        async with self.session() as session:
            found = await session.settings()
        owner = user_named(self._config.cluster.owner)
        files = await asyncio.to_thread(read_outside, found, self._config.pgdata, owner)
        return {**found, "files": files} if files else found

    async def _soon(self, answer: Awaitable[T]) -> T:
        """What Postgres answers within PATIENCE_SECONDS. Raises PreconditionError otherwise."""
        try:
            return await asyncio.wait_for(answer, PATIENCE_SECONDS)
        except TimeoutError:
            session, self._open = self._open, None
            if session is not None:
                await session.close(timeout=0.1)
            raise PreconditionError(
                f"postgres did not answer in {PATIENCE_SECONDS:g} s", "see whether it runs and what it waits for"
            ) from None
