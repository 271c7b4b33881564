"""What the agent does beside its loop: increments are merged, old points and clones let go of.

Nothing waits for it, but at a full disk the agent for room (`full`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pgcdp import log
from pgcdp.config import Config, load_config
from pgcdp.errors import PgcdpError
from pgcdp.expiring import is_rewinding, policy_of
from pgcdp.fsio import told
from pgcdp.intervals.stages import Stages
from pgcdp.machine import Place
from pgcdp.recovery import clone
from pgcdp.recovery.expiring import AnotherRuns, Run, Unreadable, expiring, have_reserve
from pgcdp.recovery.merged import merge_due
from pgcdp.serving import full
from pgcdp.serving.scrubber import Scrubber
from pgcdp.store.layout import Store
from pgcdp.store.reserve import Reserve

logger = log.get(__name__)

EXPIRE_SECONDS = 60.0
"""How often it is looked whether the policy lets go of something, besides at each boundary."""
CLONES_SECONDS = 5.0
"""How often it looks for clones whose time is over."""


class Background:
    """One thread of its own, one thing at a time. `stopping` says whether the agent is about to end, `ousted` whether
    another machine has the store."""

    def __init__(self, config: Config, stopping: Callable[[], bool], ousted: Callable[[], bool]) -> None:
        self.not_expired = ""
        self._not_merged = ""
        self._config = config
        self._stopping = stopping
        self._ousted = ousted
        self.scrubber = Scrubber(config, stopping)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="merging")
        self._running: asyncio.Future[None] | None = None
        self._merged_upto = -1  # the newest interval when it was looked last
        self._expired_at = -EXPIRE_SECONDS
        self._unreadable = Unreadable()  # of what retention would let go of

    def begin(self, stages: Stages) -> None:
        """Begin what is due, unless something is under way."""
        self.scrubber.begin(stages.store)
        number = stages.newest.number if stages.newest is not None else -1
        if self._running is not None and not self._running.done():
            return
        loop = asyncio.get_running_loop()
        if number != self._merged_upto:
            self._merged_upto = number
            self._expired_at = -EXPIRE_SECONDS  # ages count back from the newest boundary: now some are old enough
            self._running = loop.run_in_executor(self._thread, self._merge, stages.store)
        elif time.monotonic() - self._expired_at >= EXPIRE_SECONDS:
            self._expired_at = time.monotonic()
            self._running = loop.run_in_executor(self._thread, self._expire, stages.store)

    async def make_room(self) -> full.Made:
        """The store's disk is full: what the settings say goes now, with the reserve. Waits for what is under way."""
        made = await asyncio.get_running_loop().run_in_executor(self._thread, self._make_room)
        self._expired_at = -EXPIRE_SECONDS  # what else may go follows soon
        return made

    def _make_room(self) -> full.Made:
        try:
            return full.make_room(load_config(self._config.name), self._unreadable, self._stopping)
        except Exception as error:  # as in `_expire`
            if isinstance(error, PgcdpError):
                return full.Made(0, f"{error.message} ({error.hint})" if error.hint else error.message)
            return full.Made(0, told(error) if isinstance(error, OSError) else f"retention failed: {error!r}")

    async def expire_clones(self) -> None:
        """Destroy those whose time is over, without end."""
        while True:
            await asyncio.sleep(CLONES_SECONDS)
            try:
                await asyncio.to_thread(clone.expire, self._config.paths.root, self._config.name)
            except Exception as error:  # the next time is soon; the agent has more to do than this
                logger.warning("cannot look for clones whose time is over: %r", error)

    def close(self) -> None:
        """Wait for what is under way, which ends soon when the agent is stopping."""
        self._thread.shutdown()
        self.scrubber.close()

    def _must_end(self) -> bool:
        return self._stopping() or self._ousted()

    def _expire(self, store: Store) -> None:
        """Let go of what the settings say, as they are now."""
        run: Run | None = None
        try:
            config = load_config(self._config.name)
            policy, reserve = policy_of(config), Reserve(store, Place.here(config.root))
            if policy.keeps_all or is_rewinding(config):
                self.not_expired = ""
                have_reserve(reserve)
                return
            with expiring(store):
                run = Run(
                    store, policy, level=config.compression_level, unreadable=self._unreadable,
                    stop=lambda: self._must_end() or is_rewinding(config), reserve=reserve,
                )  # fmt: skip
                run.run()
        except AnotherRuns:
            return
        except Exception as error:  # capture must not lose its agent for it
            problem = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        else:
            left = len(self._unreadable.steps())
            problem = "; ".join(run.done.failed) or (
                f"{left} intervals are damaged and stay as they are" if left else ""
            )
        if run is not None:  # also what was done before something was in the way
            run.done.tell()
        if problem and problem != self.not_expired:
            logger.warning("retention: %s", problem)
        self.not_expired = problem

    def _merge(self, store: Store) -> None:
        try:
            done = merge_due(store, self._must_end)
        except Exception as error:  # they are expendable
            problem = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            if problem != self._not_merged:
                logger.warning("increments were not merged: %s", problem)
            self._not_merged = problem
        else:
            self._not_merged = ""
            if done:
                logger.info("%d merged increments were made", done)
