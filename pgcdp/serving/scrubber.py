"""The agent's scrub: all of the store is read once in a period, at a bounded rate, when nobody else wants to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pgcdp import log, scrubbing
from pgcdp.background import give_way_wholly
from pgcdp.config import Config, load_config
from pgcdp.errors import PreconditionError
from pgcdp.expiring import is_rewinding
from pgcdp.store.layout import Store
from pgcdp.store.scrub_record import read_record
from pgcdp.store.scrubbing import Pace, Stopped, is_wanted, scrub

logger = log.get(__name__)

LOOK_SECONDS = 10.0
"""How often it is looked whether a scrub is due."""


class Scrubber:
    """A thread of its own. `stopping` says whether the agent is about to end."""

    def __init__(self, config: Config, stopping: Callable[[], bool]) -> None:
        self._config = config
        self._stopping = stopping
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scrub", initializer=give_way_wholly)
        self._running: asyncio.Future[None] | None = None
        self._looked_at = -LOOK_SECONDS
        self._problem = ""

    @property
    def running(self) -> bool:
        """Whether it reads now."""
        return self._running is not None and not self._running.done()

    def begin(self, store: Store) -> None:
        """Begin when it is due, unless it is under way."""
        if self.running or time.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = time.monotonic()
        try:
            every = load_config(self._config.name).scrub_every
        except Exception:  # the settings are being written; who needs them says so
            return
        since_ns = store.baseline.time_ns if store.baseline is not None else time.time_ns()
        if scrubbing.is_due(read_record(store), every, time.time_ns(), since_ns):
            self._running = asyncio.get_running_loop().run_in_executor(self._thread, self._scrub, store)

    def close(self) -> None:
        """Wait for its end, which comes soon when the agent is stopping."""
        self._thread.shutdown()

    def _scrub(self, store: Store) -> None:
        try:
            config = load_config(self._config.name)

            def stop() -> bool:
                return self._stopping() or is_rewinding(config) or is_wanted(store)

            if stop():
                return
            done = scrub(Store.open(store.path, store.set_id), "agent", Pace(config.scrub_rate, stop))
            scrubbing.remember_pass(store, done)
            damages = done.record.damages
            for damage in damages[: scrubbing.FILES]:
                logger.error("scrub: %s at offset %d: %s", damage.file, damage.offset, damage.message)
            logger.info("scrub: all of the store was read, %d damages", len(damages))
            self._problem = ""
        except (Stopped, PreconditionError):  # somebody checks now, or the agent ends: it goes on later
            return
        except Exception as error:  # capture must not lose its agent for it
            problem = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            if problem != self._problem:
                logger.warning("the scrub failed: %s", problem)
            self._problem = problem
