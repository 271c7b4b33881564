"""The agent's keeper: capture goes on when its process has died, and is swapped for an installed version on request."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from pgcdp import log
from pgcdp.capture import held, holder
from pgcdp.capture.keeper import Keeper
from pgcdp.config import Config, load_config
from pgcdp.errors import PgcdpError
from pgcdp.store.catalog import Catalog
from pgcdp.store.layout import Store

logger = log.get(__name__)

CAPTURE = "capture"
"""The event: {"event", "why", "pid", "seconds", "captures"}. `why` is "died" or "upgrade", `seconds` how long it took
until the next process served, `captures` how many have served the holder's connection by then."""


class Keeping:
    """Keeps from `start` to `close`. What it writes down of it, a thread of its own writes: a store that hangs must not
    keep the next capture process from its start."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keeper = Keeper(config.paths, lambda seconds: self._tell("died", seconds))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="keeping")

    def start(self) -> None:
        """Begin."""
        self._keeper.__enter__()

    def close(self) -> None:
        """End; what is told is written down."""
        self._keeper.__exit__()
        self._writer.shutdown()

    @property
    def error(self) -> str:
        """What keeps a capture process from following one that died; "" when nothing does."""
        return self._keeper.error

    def swap(self) -> dict[str, Any]:
        """The installed engine captures instead of the running one: {"pid", "seconds"}. Raises as `held.swap`."""
        since = time.monotonic()
        held.swap(load_config(self._config.name))
        seconds = time.monotonic() - since
        self._tell("upgrade", seconds)
        process = holder.pid_at(self._config.paths.control)
        return {"pid": process, "seconds": round(seconds, 3)}

    def _tell(self, why: str, seconds: float) -> None:
        found = holder.find(self._config.paths)
        event = {
            "event": CAPTURE,
            "why": why,
            "pid": holder.pid_at(self._config.paths.control),
            "seconds": round(seconds, 3),
            "captures": found.captures if found else None,
        }
        self.remember(event)

    def remember(self, event: dict[str, Any]) -> None:
        """Have it written into the store's history, soon."""
        with suppress(RuntimeError):  # the agent is about to end, and has waited long enough for what begins now
            self._writer.submit(self._write, time.time_ns(), event)

    def _write(self, time_ns: int, event: dict[str, Any]) -> None:
        try:
            catalog = Catalog.open(Store.open(self._config.store, self._config.set_id_bytes))
            try:
                catalog.remember("event", time_ns, event)
            finally:
                catalog.close()
        except (PgcdpError, OSError) as error:
            logger.warning("the history lacks an event, %s: %s", event["event"], error)
