"""How much of the machine the agent takes: what nobody else wants, as long as it keeps up.

On a busy machine with few cores a commit passes through several threads; one that has to wait for a core which the
agent compresses on, or for a disk which the agent reads the journal from, is late. SCHED_IDLE and the idle class of I/O
give way at once. Alone they could starve: so the agent works at low, but normal priority as soon as it is behind.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable

from pgcdp import proc
from pgcdp.errors import PgcdpError

log = logging.getLogger(__name__)

BEHIND_SECONDS = 15.0
"""How long the agent may be behind the journal before it stops giving way."""
NICE = 10
ADJUST_SECONDS = 1.0


class Pace:
    """Of one thread, by its native id. `hurry`: whether it must not starve now, beside being behind for long."""

    def __init__(self, thread: int, hurry: Callable[[], bool]) -> None:
        self._thread = thread
        self._hurry = hurry
        self._kept_up = time.monotonic()
        self._idle: bool | None = None
        self._failed = ""
        self._one = threading.Lock()

    def keeps_up(self) -> None:
        """The thread has done all that there was to do."""
        self._kept_up = time.monotonic()

    async def run(self) -> None:
        """Adjust it for ever."""
        while True:
            try:
                await asyncio.to_thread(self.adjust)
            except Exception:  # production may be slower for it, nothing else
                log.exception("unexpected")
            await asyncio.sleep(ADJUST_SECONDS)

    def adjust(self) -> None:
        """Set the thread's priority to what holds now. Called from another thread."""
        with self._one:
            idle = time.monotonic() - self._kept_up < BEHIND_SECONDS and not self._hurry()
            if idle != self._idle:
                self._set(idle)

    def _set(self, idle: bool) -> None:
        policy = os.SCHED_IDLE if idle else os.SCHED_BATCH
        try:
            os.sched_setscheduler(self._thread, policy, os.sched_param(0))
            proc.run(["ionice", "--class", "idle" if idle else "best-effort", "--pid", str(self._thread)])
        except (OSError, PgcdpError) as error:
            if self._failed != str(error):
                log.warning("priority of the agent's work not set: %s", error)
            self._failed = str(error)
        else:
            self._idle = idle


def start_low() -> None:
    """The calling process, and what it starts, at low priority: a core that is wanted is not interrupted by it."""
    os.nice(NICE)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
