"""When to cut: asks Postgres for checkpoints, and says which of those in the stream become boundaries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from pgcdp import log
from pgcdp.capture.attach import syncfs
from pgcdp.capture.control import EngineStatus
from pgcdp.config import Config
from pgcdp.intervals import policy
from pgcdp.intervals.cutter import Checkpoint
from pgcdp.intervals.stages import Stages
from pgcdp.postgres.agent_session import Session
from pgcdp.postgres.control import State
from pgcdp.serving.questions import InWorker
from pgcdp.units import format_lsn

logger = log.get(__name__)

RETRY_SECONDS = 5.0
"""How long none is asked for after one that failed, or that was to lie behind a gap."""
SHUTDOWN_SECONDS = 600.0
"""How long a shutdown of Postgres that was announced is waited for."""


class Cutting:
    """One checkpoint is asked for at a time: `asking` is what it is waited for with, `asked` why.

    `stages` and `session` give those of the agent, `durable_write` asks the engine, `wake` begins the next turn.
    """

    def __init__(
        self,
        config: Config,
        stages: Callable[[], Stages | None],
        session: Callable[[], AbstractAsyncContextManager[Session]],
        durable_write: Callable[[], int],
        in_worker: InWorker,
        wake: Callable[[], None],
    ) -> None:
        self.asked: str | None = None
        self.asking: asyncio.Task[int] | None = None
        self._config = config
        self._stages = stages
        self._session = session
        self._durable_write = durable_write
        self._in_worker = in_worker
        self._wake = wake
        self._policy = policy.parse_policy(config.cut)
        self._asked_lsn: int | None = None
        self._shutdown_until = 0.0
        self._gone_back = -1  # the write behind which the WAL lies before where it was
        self._ask_again_at = 0.0
        self._no_checkpoint: str | None = None
        self._rate = 0.0
        self._rate_seen = (time.monotonic(), 0)

    def forget_passed(self, stages: Stages) -> None:
        """A checkpoint that was cut at, or passed over because a reader held the image, is asked for anew."""
        if self.asking is None and self._asked_lsn is not None and stages.finder.passed(self._asked_lsn):
            self.forget()

    def forget(self) -> None:
        """What was asked for has come."""
        self.asked = self._asked_lsn = None

    def ask_for_baseline(self) -> None:
        """The checkpoint that ends the baseline, unless it is asked for already."""
        if self.asked is None and time.monotonic() >= self._ask_again_at:
            self.ask("baseline")

    def expect_shutdown(self) -> None:
        """Postgres is about to be shut down: that checkpoint becomes a boundary, and none is asked for until then."""
        self._shutdown_until = time.monotonic() + SHUTDOWN_SECONDS

    def decide(self, checkpoint: Checkpoint) -> str | None:
        """Called by the worker for each checkpoint in the stream."""
        if checkpoint.control.state == State.SHUT_DOWN and time.monotonic() < self._shutdown_until:
            self._shutdown_until = 0.0
            return "rewind"
        if self.asked is not None:
            return self.asked
        decision = policy.decide(self._policy, self._progress(seen=True))
        return decision.reason if decision.action == "cut" else None

    def _progress(self, *, seen: bool = False) -> policy.Progress:
        stages = self._stages()
        assert stages is not None
        assert stages.opened is not None
        opened = stages.opened
        return policy.Progress(
            seconds=time.monotonic() - stages.begun,
            writes=opened.last_write - opened.from_write + 1,
            bytes_written=opened.bytes_written,
            rate=self._rate,
            checkpoint_seen=seen,
            checkpoint_asked=self.asked is not None,
        )

    def watch(self, stages: Stages, status: EngineStatus) -> None:
        """Whether it is time to ask Postgres for a checkpoint."""
        now, written = time.monotonic(), int(status.raw.get("bytes_written", 0))
        before, then = self._rate_seen
        self._rate = policy.smooth_rate(self._rate, max(0, written - then), now - before)
        self._rate_seen = (now, written)
        if stages.opened is None or self.asked is not None or now < max(self._ask_again_at, self._shutdown_until):
            return
        if stages.behind:  # a reader holds the image: no checkpoint could be cut at, and each costs Postgres
            return
        if stages.newest is not None and stages.finder.healed > stages.newest.write:
            self._ask_again_at = now + RETRY_SECONDS
            self.ask("gap")  # the set is healed with the boundary behind it: again and again until there is one
            return
        decision = policy.decide(self._policy, self._progress())
        if decision.action == "ask":
            self.ask(decision.reason or "period")

    def ask(self, reason: str) -> asyncio.Task[int]:
        """Have Postgres run a checkpoint; the task's result is its LSN. One at a time."""
        if self.asking is None:
            self.asked, self._asked_lsn = reason, None
            self.asking = asyncio.create_task(self._checkpoint())
            self.asking.add_done_callback(self._asked_done)
        return self.asking

    async def _checkpoint(self) -> int:
        """What was written without fsync must be on the volumes before the checkpoint says that all is (R6)."""
        async with self._session() as session:
            await self._see_whether_it_went_back(session)
            await asyncio.to_thread(syncfs, [volume.mountpoint for volume in self._config.volumes])
            await session.checkpoint()
            return await session.checkpoint_lsn()

    async def _see_whether_it_went_back(self, session: Session) -> None:
        """A copy of the data directory in its place has an older checkpoint than was captured: boundaries go on there.

        What was captured before Postgres is asked cannot be newer than its answer otherwise.
        """
        stages = self._stages()
        if stages is None or stages.baseline is not None or stages.newest is None:
            return
        captured = stages.finder.checkpoint_lsn
        said = await session.checkpoint_lsn()
        if said < captured:
            logger.info("the WAL went back from %s to %s", format_lsn(captured), format_lsn(said))
            self._gone_back = await self._in_worker(self._durable_write)
            await self._in_worker(stages.finder.go_back, self._gone_back, said)

    def _asked_done(self, task: asyncio.Task[int]) -> None:
        self.asking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            message = getattr(error, "message", None) or str(error)
            if message != self._no_checkpoint:
                logger.warning("no checkpoint: %s", message)
            self._no_checkpoint = message
            self.asked = self._asked_lsn = None
            self._ask_again_at = time.monotonic() + RETRY_SECONDS
        elif not task.cancelled():
            self._no_checkpoint = None
            self._asked_lsn = task.result()
        self._wake()

    def reached(self, checkpoint_lsn: int) -> bool:
        """Whether a boundary at or behind that checkpoint is stored."""
        stages = self._stages()
        newest = stages.newest if stages else None
        if stages is None or newest is None or newest.write <= max(self._gone_back, stages.finder.rewound):
            return False
        return newest.checkpoint_lsn >= checkpoint_lsn
