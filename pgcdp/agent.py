"""The service of one set: the only place that wires capture, intervals and store together.

One asyncio loop asks the engine how far the journal is, decides when to cut, and answers at its socket; the stages
(intervals/stages.py) run in one worker thread, one step at a time. What fails is said in the status and the log, and
begun again from what is on disk: there is no state that only this process has.

The socket takes a JSON object a line and answers with one: {"cmd":"status"}, {"cmd":"cut"}, {"cmd":"cut_at_shutdown"},
{"cmd":"grow","volume","bytes"}, {"cmd":"swap"}, {"cmd":"stop"}.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from pgcdp import log
from pgcdp.background import give_way, keep_freed_memory
from pgcdp.capture import renewing
from pgcdp.capture.clocks import CLOCK, ClockWatch
from pgcdp.capture.control import EngineClient, EngineGone, EngineStatus
from pgcdp.capture.journal import BatchRun, Journal
from pgcdp.config import Config, load_config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.fsio import FileLock
from pgcdp.intervals.stages import Stages, StageSettings
from pgcdp.machine import Place
from pgcdp.records import Boundary
from pgcdp.recovery.expiring import have_reserve
from pgcdp.recovery.make_way import MakeWay
from pgcdp.serving.answers import Answers, Json
from pgcdp.serving.background import Background
from pgcdp.serving.cutting import Cutting
from pgcdp.serving.full import of_the_store
from pgcdp.serving.healing import Healing, refuse_while_tracking
from pgcdp.serving.keeping import Keeping
from pgcdp.serving.metrics import Numbers, registry
from pgcdp.serving.metrics_door import MetricsService
from pgcdp.serving.prover import Prover
from pgcdp.serving.questions import Questions
from pgcdp.serving.rates import Rates
from pgcdp.serving.store import open_store, without_put_back
from pgcdp.serving.surroundings import Surroundings
from pgcdp.serving.telling import MAKE_ROOM, describe, of_the_journal, problem, stored_json
from pgcdp.store.bundle import Bundle
from pgcdp.store.lease import Lease
from pgcdp.store.mirroring import Mirror
from pgcdp.store.notes import clear_old_catalog
from pgcdp.store.reserve import Reserve, is_short

logger = log.get(__name__)

TICK_SECONDS = 0.5
STALLED_TICK_SECONDS = 0.05
BASELINE_TICK_SECONDS = 0.1
RETRY_SECONDS = 5.0
PRESSURE = 0.5
"""Share of the journal's limit from which on segments are freed before their interval ends."""


class Agent:
    """The service of one set. `run` serves until it is told to stop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine = EngineClient(config.paths.control)
        self.stages: Stages | None = None
        self.catalog: Mirror | None = None
        self.store_lock: Lease | None = None
        self.ousted = False
        self.status: EngineStatus | None = None
        self.questions = Questions(config, self._in_worker)
        self.cutting = Cutting(
            config, lambda: self.stages, self.questions.session, self.engine.durable_write, self._in_worker, self._wake
        )
        self.rewound = -1  # the end of the newest rewind in place that was seen
        self.learning: asyncio.Task[int] | None = None
        self.followed = False  # for a whole turn, since the stages were opened
        self.error: str | None = None
        self.hint: str | None = None  # of the error
        self.no_room = ""  # why none could be made in a store that is full
        self.waiting = ""  # for which views the image waits
        self.stopping = asyncio.Event()
        self.wake = asyncio.Event()
        self.changed = asyncio.Condition()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="stages")
        self.surroundings = Surroundings(config, lambda: self.status is None or self._pressed(self.status))
        self.clock = ClockWatch()
        self.rates = Rates(config)
        self.errors_total = 0
        self.newest_write_ns: int | None = None
        self.newest_seen: Boundary | None = None
        self.metrics = MetricsService(config.metrics_listen, registry(config, self._numbers))
        self.background = Background(config, self.stopping.is_set, self._is_ousted)
        self.keeping = Keeping(config)
        self.prover = Prover(config)
        self.healing = Healing(self.engine)

    # --- life

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or the request to stop."""
        paths = self.config.paths
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        paths.agent_socket.unlink(missing_ok=True)
        answers = Answers(
            {
                "status": self._describe,
                "cut": self._cut,
                "cut_at_shutdown": self._cut_at_shutdown,
                "grow": self._grow,
                "swap": self._swap,
                "stop": self._end,
            },
            paths.agent_log,
        )
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(answers.serve, os.fspath(paths.agent_socket))
        finally:
            os.umask(mask)
        logger.info("agent of set %s, pid %d", self.config.name, os.getpid())
        expiring = asyncio.create_task(self.background.expire_clones())
        proving = asyncio.create_task(self.prover.run())
        self.keeping.start()
        try:
            while not self.stopping.is_set():
                await self._turn()
        finally:
            server.close()
            self.metrics.close()
            for task in (self.cutting.asking, self.learning, expiring):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):  # whatever it says, the store is let go of
                        await task
            await self.questions.end_look()
            await self._in_worker(self._leave_room)
            await self._in_worker(self._close_stages)
            proving.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await proving
            await self.questions.close()
            self.worker.shutdown()
            self.background.close()
            self.keeping.close()
            paths.agent_socket.unlink(missing_ok=True)
            logger.info("agent stopped")

    def _stop(self) -> None:
        self.stopping.set()
        self._wake()

    def _wake(self) -> None:
        self.wake.set()

    async def _turn(self) -> None:
        pause, full = TICK_SECONDS, False
        self.metrics.keep_open()
        try:
            pause = await self._tick()
            self.error, self.no_room = None, ""
        except EngineGone as error:  # the next engine may be another one: begin anew from what is on disk
            self.status = None
            self._note(error.message)
            await self._in_worker(self._give_up_stages)
        except (PgcdpError, OSError) as error:
            if of_the_journal(self.config, error):  # what was taken before it may be nowhere else
                await self._in_worker(self._leave_room)
            full = of_the_store(self.config, error)
            self._note(*(self._store_full(error) if full else problem(self.config, error)))
            await self._in_worker(self._give_up_stages)
            pause = RETRY_SECONDS
        except Exception as error:  # a bug in us: capture must not lose its agent for it
            logger.exception("unexpected")
            self._note(f"the agent failed: {error!r}")
            await self._in_worker(self._give_up_stages)
            pause = RETRY_SECONDS
        async with self.changed:
            self.changed.notify_all()
        if full and await self._make_room():
            pause = 0.0
        if pause:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), pause)
            self.wake.clear()

    def _store_full(self, error: PgcdpError | OSError) -> tuple[str, str]:
        """What waits, and why there is no room."""
        newest, (message, _) = self._newest(), problem(self.config, error)
        if newest is not None:
            message += f"; what was written since boundary {newest.number} waits in the journal"
        return message, self._room_hint()

    def _room_hint(self) -> str:
        return f"{self.no_room}; {MAKE_ROOM}" if self.no_room else MAKE_ROOM

    async def _make_room(self) -> bool:
        """Let go of what the settings say, before the journal's writes fill what the reserve gives free."""
        made = await self.background.make_room()
        before, self.no_room = self.no_room, "" if made.bytes else made.why
        if self.no_room not in ("", before):
            logger.warning("the store is full: %s", self.no_room)
        self.hint = self._room_hint()
        return made.bytes > 0

    def _note(self, message: str, hint: str | None = None) -> None:
        if message != self.error:
            logger.error("%s", message)
            self.errors_total += 1
        self.error, self.hint = message, hint

    async def _in_worker(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, work, *arguments)

    # --- one turn of the loop

    async def _tick(self) -> float:
        """One step of the stages; returns how long to wait before the next."""
        self.status = status = await self._in_worker(self.engine.status)
        self.rates.read(status)
        if self.stages is None:
            if self.learning is not None:
                self.learning.cancel()
                self.learning = None
            if self.error is None and is_short(self.config.store):
                await self.background.make_room()
            await self._in_worker(self._open_stages, status)
        stages = self.stages
        assert stages is not None
        assert self.store_lock is not None
        await self._in_worker(self.store_lock.keep)
        if status.state != "stalled":  # else Postgres waits for what follows here
            busy = self.cutting.asking is not None or self.learning is not None
            await self.questions.refresh_settings(busy=busy)
        if stages.baseline is not None:
            return await self._baseline_tick(stages, status)
        await self._in_worker(self.rates.read_store)
        if status.state != "stalled":
            await self.questions.look(stages, busy=self.cutting.asking is not None)
        published = await self._in_worker(
            stages.follow, status.durable_write, self.cutting.decide, self.questions.settings
        )
        self.cutting.forget_passed(stages)
        if stages.finder.rewound > self.rewound:  # settings and catalogs are those of then
            self.rewound = stages.finder.rewound
            self.questions.ask_anew()
        if self._pressed(status):
            await self._in_worker(stages.relieve)
        await self._in_worker(self.healing.see, status, stages.store)
        if status.tracked is None:  # else no checkpoint could be cut at
            self.cutting.watch(stages, status)
        self.background.begin(stages)
        self.followed = True
        more = stages.opened is not None and stages.opened.last_write < status.durable_write
        if published or more:
            return 0.0
        return STALLED_TICK_SECONDS if status.state == "stalled" else TICK_SECONDS

    async def _baseline_tick(self, stages: Stages, status: EngineStatus) -> float:
        baseline = stages.baseline
        assert baseline is not None
        await self._in_worker(self.healing.see, status, stages.store)
        if stages.baseline_end is None:
            await self._in_worker(stages.baseline_step, status.synced_write)
            status = await self._in_worker(self.engine.status)  # the journal has filled while the copy went on
            if self._pressed(status) or (baseline.complete and self.learning is None):
                await self._in_worker(stages.relieve)
            return await self._baseline_copied(stages) if baseline.complete else 0.0
        if await self._in_worker(stages.finish_baseline, status.durable_write):
            assert self.catalog is not None
            assert stages.store.baseline is not None
            await self._in_worker(self.catalog.put_baseline, stages.store.baseline)
            self.cutting.forget()
            return 0.0
        if self._pressed(status):
            await self._in_worker(stages.relieve)
        self.cutting.ask_for_baseline()
        return BASELINE_TICK_SECONDS

    async def _baseline_copied(self, stages: Stages) -> float:
        """Learn the newest checkpoint. Postgres may wait for the journal: room is made in it meanwhile."""
        if self.learning is None:
            self.learning = asyncio.create_task(self.questions.newest_checkpoint())
        if not self.learning.done():
            return BASELINE_TICK_SECONDS
        learnt, self.learning = self.learning, None
        durable = (await self._in_worker(self.engine.status)).durable_write
        await self._in_worker(stages.baseline_copied, durable, learnt.result())
        return 0.0

    def _pressed(self, status: EngineStatus) -> bool:
        return status.state in ("stalled", "tracking") or status.journal_bytes > PRESSURE * status.journal_limit

    def _open_stages(self, status: EngineStatus) -> None:
        config = self.config
        self.waiting = ""
        store = open_store(config, status)
        self.store_lock = Lease.take(store, Place.here(config.root))
        have_reserve(Reserve(store, self.store_lock.here))
        store = without_put_back(store, config, status)
        self.stages = Stages.open(
            store,
            Journal(config.journal, config.set_id_bytes),
            self.engine,
            StageSettings(
                int(config.cluster.system_identifier),
                tuple(volume.backing for volume in config.volumes),
                config.apply,
                config.compression_level,
            ),
            make_way=MakeWay(config.fence_after, self._wait_for_views),
            synced=status.synced_write,
            released=status.released_write,
        )
        if self.stages.opened is not None:
            hint = f"pgcdp down {config.name}, and bring the journal's files back as they were last"
            renewing.refuse_older(config, status.durable_write, self.stages.opened.last_write, hint)
        self.catalog = Mirror(self.stages.store, make=True)
        self.catalog.catch_up()
        clear_old_catalog(self.stages.store)
        self.stages.published = self._remember
        self.stages.taken = self._see_clock
        self.stages.file_map = self.surroundings.file_map
        self.stages.outside = partial(self.surroundings.look_outside, self.stages)

    def _is_ousted(self) -> bool:
        """Whether another machine has the store now: nothing may be written there."""
        lease = self.store_lock
        if lease is not None:
            self.ousted = lease.lost
        return self.ousted

    def _wait_for_views(self, text: str) -> None:
        self.waiting = text

    def _leave_room(self) -> None:
        """What was taken is made durable and given free: the next agent goes on from there, and what is written between
        this one's end and that of capture finds room in the journal."""
        with suppress(PgcdpError, OSError):
            if self.stages is not None and not self._is_ousted():
                self.stages.relieve()

    def _close_stages(self) -> None:
        self._newest()
        self.followed = False
        stages, self.stages = self.stages, None
        catalog, self.catalog = self.catalog, None
        lock, self.store_lock = self.store_lock, None
        with ExitStack() as closing:  # each of them, whatever the others raise
            if lock is not None:
                closing.callback(lock.release)
            if catalog is not None:
                closing.callback(catalog.close)
            if stages is not None:
                closing.callback(stages.close)

    def _give_up_stages(self) -> None:
        """After an error: what fails in closing is of the same kind, and must not end the agent."""
        try:
            self._close_stages()
        except Exception as error:
            logger.warning("closing the store: %s", error)

    def _newest(self) -> Boundary | None:
        """The newest boundary of the store; as it was seen last while that cannot be read, so that the lag is known."""
        stages = self.stages
        if stages is not None and stages.newest is not None:
            self.newest_seen = stages.newest
        return self.newest_seen

    def _numbers(self) -> Numbers:
        """For a scrape, in its own thread: each is looked at once."""
        stages, questions = self.stages, self.questions
        stored = self._newest()
        newest, opened = (stages.newest, stages.opened) if stages is not None else (None, None)
        newest_ns = None if newest is None else newest.time_ns
        if newest is not None and opened is not None and opened.last_write > newest.write:
            newest_ns = self.newest_write_ns or newest_ns
        return Numbers(
            status=self.status,
            store=None if stages is None else stages.store,
            error=self.error,
            errors_total=self.errors_total,
            newest_boundary_ns=None if stored is None else stored.time_ns,
            newest_write_ns=newest_ns,
            stored_write=None if stored is None else stored.write,
            look_seconds=None if newest is None else time.monotonic() - questions.whole_look_at,
            rates=self.rates.told(),
        )

    def _see_clock(self, run: BatchRun) -> None:
        self.newest_write_ns = int(run.records["wall_ns"][-1])
        for jump in self.clock.take(run):
            logger.warning("the wall clock was set by %.1f s before write %d", jump.seconds, jump.write)
            self.keeping.remember({"event": CLOCK, **asdict(jump)})

    def _remember(self, bundle: Bundle) -> None:
        assert self.catalog is not None
        self.catalog.put_interval(bundle)

    # --- what is asked at the socket

    async def _describe(self, request: Json) -> Json:
        return {
            "hint": self.hint if self.error else None,
            **stored_json(self._newest()),
            **describe(
                self.stages, self.error, self.waiting, self.questions, self.surroundings, self.background, self.prover
            ),
            "rates": self.rates.told(),
            "metrics": self.metrics.told(),
            "not_kept": self.keeping.error,
            "clock_jumps": [asdict(jump) for jump in list(self.clock.jumps)],
        }

    async def _end(self, request: Json) -> Json:
        self._stop()
        return {"stopping": True}

    async def _cut(self, request: Json) -> Json:
        """A boundary now: waits until the interval that ends there is published."""
        await self._complete()
        refuse_while_tracking(self.status, "no boundary can be cut")
        cutting = self.cutting
        if cutting.asking is not None:
            await cutting.ask("requested")
        while True:
            wanted = await cutting.ask("requested")
            await self._until(lambda lsn=wanted: cutting.reached(lsn) or cutting.asked is None)  # type: ignore[misc]
            stages = self.stages
            if stages is not None and stages.newest is not None and cutting.reached(wanted):
                return {"boundary": stages.newest.number, "write": stages.newest.write}
            # A restore read the image, so that nothing could be cut at this one.
            await self._until(lambda: self.stages is not None and not self.stages.behind)

    async def _cut_at_shutdown(self, request: Json) -> Json:
        """Postgres is about to be shut down: that checkpoint becomes a boundary, and none is asked for until then."""
        await self._complete()
        self.cutting.expect_shutdown()
        while self.cutting.asking is not None:
            await asyncio.wait({self.cutting.asking})
        return {"waiting": True}

    async def _grow(self, request: Json) -> Json:
        """A volume, by number, is to become larger: the store is ready for it when this is answered."""
        stages = await self._complete()
        refuse_while_tracking(self.status, "no volume can grow")
        await self._in_worker(stages.grow, int(request["volume"]), int(request["bytes"]))
        return {"bytes": int(request["bytes"])}

    async def _swap(self, request: Json) -> Json:
        """The installed engine captures instead of the running one when this is answered."""
        return await asyncio.to_thread(self.keeping.swap)

    async def _complete(self) -> Stages:
        """The stages, behind the baseline. The agent may have just been started by who asks: its first turn opens them,
        and looks at the catalogs, which it does not while a checkpoint is asked for.

        Raises PreconditionError with what keeps it from that, or while the baseline is not complete.
        """

        def copying() -> bool:
            return self.stages is not None and self.stages.baseline is not None

        async with self.changed:
            await self.changed.wait_for(lambda: self.error is not None or self.followed or copying())
        if self.stages is None:
            raise PreconditionError(f"the agent does not follow: {self.error}", self.hint)
        if copying():
            raise PreconditionError("the baseline is not complete", "pgcdp status tells how far it is")
        return self.stages

    async def _until(self, happened: Callable[[], bool]) -> None:
        """Wait for a turn after which it has happened. Raises PgcdpError with what went wrong before it did."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.error is not None or happened())
        if not happened():
            raise PgcdpError(f"no boundary was stored: {self.error}", f"look at {self.config.paths.agent_log}")


def main(set_name: str) -> int:
    """`pgcdp agent SET`: serve in the foreground, log to the set's agent log; the exit code."""
    config = load_config(set_name)
    log.start(config.paths.agent_log)
    os.umask(0o077)  # what it writes is the cluster's data
    give_way()
    keep_freed_memory()
    with FileLock(config.paths.agent_lock, f"the agent of set {set_name}"):
        asyncio.run(Agent(config).run())
    return 0
