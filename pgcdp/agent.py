"""The service of one set: the only place that wires capture, intervals and store together.

One asyncio loop asks the engine how far the journal is, decides when to cut, and answers at its socket; the stages
(intervals/stages.py) run in one worker thread, one step at a time. What fails is said in the status and the log, and
begun again from what is on disk: there is no state that only this process has.

The socket takes a JSON object a line and answers with one: {"cmd":"status"}, {"cmd":"cut"}, {"cmd":"cut_at_shutdown"},
{"cmd":"grow","volume","bytes"}, {"cmd":"stop"}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

from pgcdp import log
from pgcdp.background import give_way, keep_freed_memory
from pgcdp.capture.attach import syncfs
from pgcdp.capture.engine import EngineClient, EngineGone, EngineStatus
from pgcdp.capture.filemap import FileMap, FileMapper, places_of
from pgcdp.capture.journal import Journal
from pgcdp.capture.outside import Looker, Outside
from pgcdp.config import Config, load_config
from pgcdp.errors import BugError, PgcdpError, PreconditionError
from pgcdp.expiring import is_rewinding, policy_of
from pgcdp.fsio import FileLock
from pgcdp.intervals import policy
from pgcdp.intervals.cutter import Checkpoint
from pgcdp.intervals.indexing import newest_look
from pgcdp.intervals.stages import Stages, StageSettings
from pgcdp.postgres.agent_session import Session
from pgcdp.postgres.catalogs import look
from pgcdp.postgres.control import State
from pgcdp.postgres.relations import Look
from pgcdp.postgres.session import Dsn, Settings
from pgcdp.recovery import clone
from pgcdp.recovery.expiring import AnotherRuns, Run, Unreadable, expiring
from pgcdp.recovery.make_way import MakeWay
from pgcdp.recovery.merged import merge_due
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from pgcdp.store.mirroring import Mirror
from pgcdp.units import format_lsn

logger = log.get(__name__)
T = TypeVar("T")

TICK_SECONDS = 0.5
STALLED_TICK_SECONDS = 0.05
BASELINE_TICK_SECONDS = 0.1
RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 5.0
"""How long a step waits for Postgres, which may itself wait for a journal that only this agent can make room in."""
SETTINGS_SECONDS = 60.0
LOOK_SECONDS = 30.0
"""How long a look at the catalogs waits for each database; other work goes on meanwhile."""
FILES_SECONDS = 5.0
"""How long a boundary waits for the filesystems to say whose their blocks are; not at all while the journal fills."""
FILES_SHARE = 0.05
"""Part of the time that may go into asking them."""
EXPIRE_SECONDS = 60.0
"""How often it is looked whether the policy lets go of something, besides at each boundary."""
CLONES_SECONDS = 5.0
"""How often it looks for clones whose time is over."""
SHUTDOWN_SECONDS = 600.0
"""How long a shutdown of Postgres that was announced is waited for."""
PRESSURE = 0.5
"""Share of the journal's limit from which on segments are freed before their interval ends."""


class Agent:
    """The service of one set. `run` serves until it is told to stop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine = EngineClient(config.paths.control)
        self.policy = policy.parse_policy(config.cut)
        self.stages: Stages | None = None
        self.catalog: Mirror | None = None
        self.store_lock: FileLock | None = None
        self.status: EngineStatus | None = None
        self.session: Session | None = None
        self.session_lock = asyncio.Lock()  # it answers one question at a time
        self.settings: Settings = {}
        self.settings_at = 0.0
        self.looked_at = 0.0
        self.whole_look_at = time.monotonic()
        self.no_look = ""
        self.looking: asyncio.Task[tuple[Look, dict[str, str]]] | None = None
        self.asked: str | None = None
        self.asking: asyncio.Task[int] | None = None
        self.asked_lsn: int | None = None
        self.rewound = -1  # the end of the newest rewind in place that was seen
        self.shutdown_until = 0.0
        self.gone_back = -1  # the write behind which the WAL lies before where it was
        self.learning: asyncio.Task[int] | None = None
        self.ask_again_at = 0.0
        self.no_checkpoint: str | None = None
        self.error: str | None = None
        self.waiting = ""  # for which views the image waits
        self.rate = 0.0
        self.rate_seen = (time.monotonic(), 0)
        self.stopping = asyncio.Event()
        self.wake = asyncio.Event()
        self.changed = asyncio.Condition()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="stages")
        self.merger = ThreadPoolExecutor(1, thread_name_prefix="merging")
        self.merging: asyncio.Future[None] | None = None
        self.merged_upto = -1  # the newest interval when it was looked last
        self.not_merged = ""
        mountpoints = [volume.mountpoint for volume in config.volumes]
        self.looker = Looker(config.pgdata, mountpoints)
        self.outside: list[Outside] | None = None  # as the look at the last boundary found; None: that is not known
        self.expired_at = -EXPIRE_SECONDS
        self.not_expired = ""
        self.unreadable = Unreadable()  # of what retention would let go of
        self.files = FileMapper(places_of(config.pgdata, dict(enumerate(mountpoints))))

    # --- life

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or the request to stop."""
        paths = self.config.paths
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        paths.agent_socket.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._serve, os.fspath(paths.agent_socket))
        finally:
            os.umask(mask)
        logger.info("agent of set %s, pid %d", self.config.name, os.getpid())
        expiring = asyncio.create_task(self._expire_clones())
        try:
            while not self.stopping.is_set():
                await self._turn()
        finally:
            server.close()
            for task in (self.asking, self.learning, self.looking, expiring):
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError, PgcdpError):
                        await task
            await self._in_worker(self._leave_room)
            await self._in_worker(self._close_stages)
            if self.session is not None:
                await self.session.close()
            self.worker.shutdown()
            self.merger.shutdown()
            paths.agent_socket.unlink(missing_ok=True)
            logger.info("agent stopped")

    async def _expire_clones(self) -> None:
        """Destroy those whose time is over."""
        while True:
            await asyncio.sleep(CLONES_SECONDS)
            try:
                await asyncio.to_thread(clone.expire, self.config.paths.root, self.config.name)
            except Exception as error:  # the next time is soon; the agent has more to do than this
                logger.warning("cannot look for clones whose time is over: %r", error)

    def _stop(self) -> None:
        self.stopping.set()
        self.wake.set()

    async def _turn(self) -> None:
        pause = TICK_SECONDS
        try:
            pause = await self._tick()
            self.error = None
        except EngineGone as error:  # the next engine may be another one: begin anew from what is on disk
            self._note(error.message)
            await self._in_worker(self._give_up_stages)
        except (PgcdpError, OSError) as error:
            self._note(getattr(error, "message", None) or str(error))
            await self._in_worker(self._give_up_stages)
            pause = RETRY_SECONDS
        except Exception as error:  # a bug in us: capture must not lose its agent for it
            logger.exception("unexpected")
            self._note(f"the agent failed: {error!r}")
            await self._in_worker(self._give_up_stages)
            pause = RETRY_SECONDS
        async with self.changed:
            self.changed.notify_all()
        if pause:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), pause)
            self.wake.clear()

    def _note(self, message: str) -> None:
        if message != self.error:
            logger.error("%s", message)
        self.error = message

    async def _in_worker(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.worker, work, *arguments)

    # --- one turn of the loop

    async def _tick(self) -> float:
        """One step of the stages; returns how long to wait before the next."""
        self.status = status = await self._in_worker(self.engine.status)
        if self.stages is None:
            if self.learning is not None:
                self.learning.cancel()
                self.learning = None
            await self._in_worker(self._open_stages, status)
        stages = self.stages
        assert stages is not None
        if status.state != "stalled":  # else Postgres waits for what follows here
            await self._refresh_settings()
        if stages.baseline is not None:
            return await self._baseline_tick(stages, status)
        if status.state != "stalled":
            await self._look(stages)
        published = await self._in_worker(stages.follow, status.durable_write, self._decide, self.settings)
        if self.asking is None and self.asked_lsn is not None and stages.finder.passed(self.asked_lsn):
            self.asked = self.asked_lsn = None  # cut at, or passed over because a reader held the image: asked anew
        if stages.finder.rewound > self.rewound:  # settings and catalogs are those of then
            self.rewound = stages.finder.rewound
            self.settings_at = self.looked_at = -SETTINGS_SECONDS
        if self._pressed(status):
            await self._in_worker(stages.relieve)
        self._watch(stages, status)
        self._merge_soon(stages)
        more = stages.opened is not None and stages.opened.last_write < status.durable_write
        if published or more:
            return 0.0
        return STALLED_TICK_SECONDS if status.state == "stalled" else TICK_SECONDS

    def _merge_soon(self, stages: Stages) -> None:
        """Old intervals' increments are merged, and old points let go of, in the background: nothing waits for it."""
        number = stages.newest.number if stages.newest is not None else -1
        if self.merging is not None and not self.merging.done():
            return
        loop = asyncio.get_running_loop()
        if number != self.merged_upto:
            self.merged_upto = number
            self.expired_at = -EXPIRE_SECONDS  # ages count back from the newest boundary: now some are old enough
            self.merging = loop.run_in_executor(self.merger, self._merge, stages.store)
        elif time.monotonic() - self.expired_at >= EXPIRE_SECONDS:
            self.expired_at = time.monotonic()
            self.merging = loop.run_in_executor(self.merger, self._expire, stages.store)

    def _expire(self, store: Store) -> None:
        """Let go of what the settings say, as they are now."""
        run: Run | None = None
        try:
            config = load_config(self.config.name)
            policy = policy_of(config)
            if policy.keeps_all or is_rewinding(config):
                self.not_expired = ""
                return
            with expiring(store):
                run = Run(
                    store, policy, level=config.compression_level, unreadable=self.unreadable,
                    stop=lambda: self.stopping.is_set() or is_rewinding(config),
                )  # fmt: skip
                run.run()
        except AnotherRuns:
            return
        except Exception as error:  # capture must not lose its agent for it
            problem = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        else:
            left = len(self.unreadable.steps())
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
            done = merge_due(store, self.stopping.is_set)
        except Exception as error:  # they are expendable
            problem = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
            if problem != self.not_merged:
                logger.warning("increments were not merged: %s", problem)
            self.not_merged = problem
        else:
            self.not_merged = ""
            if done:
                logger.info("%d merged increments were made", done)

    async def _baseline_tick(self, stages: Stages, status: EngineStatus) -> float:
        baseline = stages.baseline
        assert baseline is not None
        if stages.baseline_end is None:
            await self._in_worker(stages.baseline_step, status.applied_write)
            status = await self._in_worker(self.engine.status)  # the journal has filled while the copy went on
            if self._pressed(status) or (baseline.complete and self.learning is None):
                await self._in_worker(stages.relieve)
            return await self._baseline_copied(stages) if baseline.complete else 0.0
        if await self._in_worker(stages.finish_baseline, status.durable_write):
            assert self.catalog is not None
            assert stages.store.baseline is not None
            await self._in_worker(self.catalog.put_baseline, stages.store.baseline)
            self.asked = self.asked_lsn = None
            return 0.0
        if self._pressed(status):
            await self._in_worker(stages.relieve)
        if self.asked is None and time.monotonic() >= self.ask_again_at:
            self._ask("baseline")
        return BASELINE_TICK_SECONDS

    async def _baseline_copied(self, stages: Stages) -> float:
        """Learn the newest checkpoint. Postgres may wait for the journal: room is made in it meanwhile."""
        if self.learning is None:
            self.learning = asyncio.create_task(self._newest_checkpoint())
        if not self.learning.done():
            return BASELINE_TICK_SECONDS
        learnt, self.learning = self.learning, None
        durable = (await self._in_worker(self.engine.status)).durable_write
        await self._in_worker(stages.baseline_copied, durable, learnt.result())
        return 0.0

    def _pressed(self, status: EngineStatus) -> bool:
        return status.state == "stalled" or status.journal_bytes > PRESSURE * status.journal_limit

    def _open_stages(self, status: EngineStatus) -> None:
        config = self.config
        self.waiting = ""
        if (config.store / "store.json").exists():
            store = Store.open(config.store, config.set_id_bytes)
        elif status.released_write:
            raise PreconditionError(
                f"{config.store} holds no store, but the journal of set {config.name} gave writes up to "
                f"{status.released_write} to it",
                "bring the store's disk back; nothing is captured into a new one",
            )
        else:
            store = Store.create(config.store, config.name, config.set_id_bytes, list(status.volumes), facts(config))
        self.store_lock = store.lock()
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
        self.catalog = Mirror(self.stages.store, make=True)
        self.catalog.catch_up()
        self.stages.published = self._remember
        self.stages.file_map = self._map_files
        self.stages.outside = self._look_outside

    def _wait_for_views(self, text: str) -> None:
        self.waiting = text

    def _leave_room(self) -> None:
        """What was taken is made durable and given free: the next agent goes on from there, and what is written between
        this one's end and that of capture finds room in the journal."""
        with suppress(PgcdpError, OSError):
            if self.stages is not None:
                self.stages.relieve()

    def _close_stages(self) -> None:
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

    def _map_files(self) -> FileMap | None:
        if self.status is None or self._pressed(self.status):  # it would wait for the room that is made here
            return None
        return self.files.soon(FILES_SECONDS, FILES_SHARE)

    def _look_outside(self) -> list[Outside] | None:
        """What of the cluster is not captured (truth 8), or was not at the boundary before: the interval lacks both.

        None when there is no time to look, or not every volume is mounted, or it was so at the boundary before: then
        nothing found does not mean that nothing is lacking.
        """
        pressed = self.status is None or self._pressed(self.status)
        found = None if pressed else self.looker.soon(FILES_SECONDS)
        if found is None:
            self.outside = None
            return None
        before = self._outside_before() if self.outside is None else self.outside
        for each in set(found) - set(before or ()):
            logger.warning("%s lies outside of the set, in %s: it is not captured", each.name, each.place)
        self.outside = found
        if before is None and not found:
            return None
        return sorted({*(before or ()), *found}, key=lambda each: each.name)

    def _outside_before(self) -> list[Outside] | None:
        """What the newest interval tells, which another agent, or a look that came to nothing, has left."""
        stages = self.stages
        if stages is None or stages.newest is None or stages.newest.number == 0:
            return []
        told = Bundle.open(stages.store, stages.newest.number).interval.outside
        return None if told is None else [Outside(name, Path(place)) for name, place in told]

    def _remember(self, bundle: Bundle) -> None:
        assert self.catalog is not None
        self.catalog.put_interval(bundle)

    # --- when to cut

    def _decide(self, checkpoint: Checkpoint) -> str | None:
        """Called by the worker for each checkpoint in the stream."""
        if checkpoint.control.state == State.SHUT_DOWN and time.monotonic() < self.shutdown_until:
            self.shutdown_until = 0.0
            return "rewind"
        if self.asked is not None:
            return self.asked
        decision = policy.decide(self.policy, self._progress(seen=True))
        return decision.reason if decision.action == "cut" else None

    def _progress(self, *, seen: bool = False) -> policy.Progress:
        stages = self.stages
        assert stages is not None
        assert stages.opened is not None
        opened = stages.opened
        return policy.Progress(
            seconds=time.monotonic() - stages.begun,
            writes=opened.last_write - opened.from_write + 1,
            bytes_written=opened.bytes_written,
            rate=self.rate,
            checkpoint_seen=seen,
            checkpoint_asked=self.asked is not None,
        )

    def _watch(self, stages: Stages, status: EngineStatus) -> None:
        """Whether it is time to ask Postgres for a checkpoint."""
        now, written = time.monotonic(), int(status.raw.get("bytes_written", 0))
        before, then = self.rate_seen
        self.rate = policy.smooth_rate(self.rate, max(0, written - then), now - before)
        self.rate_seen = (now, written)
        if stages.opened is None or self.asked is not None or now < max(self.ask_again_at, self.shutdown_until):
            return
        if stages.behind:  # a reader holds the image: no checkpoint could be cut at, and each costs Postgres
            return
        decision = policy.decide(self.policy, self._progress())
        if decision.action == "ask":
            self._ask(decision.reason or "period")

    def _ask(self, reason: str) -> asyncio.Task[int]:
        """Have Postgres run a checkpoint; the task's result is its LSN. One at a time."""
        if self.asking is None:
            self.asked, self.asked_lsn = reason, None
            self.asking = asyncio.create_task(self._checkpoint())
            self.asking.add_done_callback(self._asked_done)
        return self.asking

    async def _checkpoint(self) -> int:
        """What was written without fsync must be on the volumes before the checkpoint says that all is (R6)."""
        async with self.session_lock:
            session = await self._connected()
            await self._see_whether_it_went_back(session)
            await asyncio.to_thread(syncfs, [volume.mountpoint for volume in self.config.volumes])
            await session.checkpoint()
            return await session.checkpoint_lsn()

    async def _see_whether_it_went_back(self, session: Session) -> None:
        """A copy of the data directory in its place has an older checkpoint than was captured: boundaries go on there.

        What was captured before Postgres is asked cannot be newer than its answer otherwise.
        """
        stages = self.stages
        if stages is None or stages.baseline is not None or stages.newest is None:
            return
        captured = stages.finder.checkpoint_lsn
        said = await session.checkpoint_lsn()
        if said < captured:
            logger.info("the WAL went back from %s to %s", format_lsn(captured), format_lsn(said))
            self.gone_back = (await self._in_worker(self.engine.status)).durable_write
            await self._in_worker(stages.finder.go_back, self.gone_back, said)

    def _asked_done(self, task: asyncio.Task[int]) -> None:
        self.asking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            message = getattr(error, "message", None) or str(error)
            if message != self.no_checkpoint:
                logger.warning("no checkpoint: %s", message)
            self.no_checkpoint = message
            self.asked = self.asked_lsn = None
            self.ask_again_at = time.monotonic() + RETRY_SECONDS
        elif not task.cancelled():
            self.no_checkpoint = None
            self.asked_lsn = task.result()
        self.wake.set()

    async def _connected(self) -> Session:
        if self.session is None or self.session.closed:
            self.session = await Session.open(Dsn.of(self.config))
        return self.session

    async def _refresh_settings(self) -> None:
        """Postgres may be down for a while: then the last known settings hold."""
        if (
            self.asking is not None
            or self.learning is not None
            or time.monotonic() - self.settings_at < SETTINGS_SECONDS
        ):
            return
        self.settings_at = time.monotonic()
        with suppress(PgcdpError):
            self.settings = await self._soon(self._read_settings())

    async def _look(self, stages: Stages) -> None:
        """Keep the names of relations with the open interval; without a look, those of the last one hold."""
        if self.looking is None:
            if self.asking is not None or time.monotonic() - self.looked_at < SETTINGS_SECONDS:
                return
            self.looking = asyncio.create_task(self._read_catalogs(stages))
            await asyncio.wait({self.looking}, timeout=PATIENCE_SECONDS)
        if not self.looking.done():
            return
        task, self.looking = self.looking, None
        self.looked_at = time.monotonic()
        try:
            found, failed = task.result()
        except PgcdpError as error:
            problem, level = error.message, logging.INFO  # Postgres may be down
        else:
            level = logging.WARNING
            problem = "; ".join(f"database {name}: {why}" for name, why in failed.items())
            await self._in_worker(stages.look, found, self.settings)
            if not failed:
                self.whole_look_at = self.looked_at
        if problem and problem != self.no_look:
            logger.log(level, "no look at the catalogs: %s", problem)
        self.no_look = problem

    async def _read_catalogs(self, stages: Stages) -> tuple[Look, dict[str, str]]:
        number = stages.newest.number if stages.newest is not None else 0
        before = await self._in_worker(newest_look, stages.store, number)
        return await look(Dsn.of(self.config), before, LOOK_SECONDS)

    async def _read_settings(self) -> Settings:
        async with self.session_lock:
            return await (await self._connected()).settings()

    async def _newest_checkpoint(self) -> int:
        async with self.session_lock:
            return await (await self._connected()).checkpoint_lsn()

    async def _soon(self, answer: Awaitable[T]) -> T:
        """What Postgres answers within PATIENCE_SECONDS. Raises PreconditionError otherwise."""
        try:
            return await asyncio.wait_for(answer, PATIENCE_SECONDS)
        except TimeoutError:
            session, self.session = self.session, None
            if session is not None:
                await session.close(timeout=0.1)
            raise PreconditionError(
                f"postgres did not answer in {PATIENCE_SECONDS:g} s", "see whether it runs and what it waits for"
            ) from None

    # --- socket

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._reply(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # who asked has gone
        finally:
            writer.close()

    async def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            return await self._answer(json.loads(line))
        except PgcdpError as error:
            return error.as_json()
        except ValueError:
            return PgcdpError("the request is not a JSON object").as_json()
        except Exception as error:  # a bug in us must not leave the asker waiting
            logger.exception("request failed")
            return BugError(f"the agent failed: {error!r}", f"look at {self.config.paths.agent_log}").as_json()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request.get("cmd"):
            case "status":
                return self.describe()
            case "cut":
                return await self._cut()
            case "cut_at_shutdown":
                return await self._cut_at_shutdown()
            case "grow":
                return await self._grow(int(request["volume"]), int(request["bytes"]))
            case "stop":
                self._stop()
                return {"stopping": True}
        raise PgcdpError(f"the agent does not know the request {request.get('cmd')}")

    async def _cut(self) -> dict[str, Any]:
        """A boundary now: waits until the interval that ends there is published."""
        if self.stages is None or self.stages.baseline is not None:
            raise PreconditionError("the baseline is not complete", "pgcdp status tells how far it is")
        if self.asking is not None:
            await self._ask("requested")
        while True:
            wanted = await self._ask("requested")
            await self._until(lambda lsn=wanted: self._reached(lsn) or self.asked is None)  # type: ignore[misc]
            stages = self.stages
            if stages is not None and stages.newest is not None and self._reached(wanted):
                return {"boundary": stages.newest.number, "write": stages.newest.write}
            # A restore read the image, so that nothing could be cut at this one.
            await self._until(lambda: self.stages is not None and not self.stages.behind)

    async def _cut_at_shutdown(self) -> dict[str, Any]:
        """Postgres is about to be shut down: that checkpoint becomes a boundary, and none is asked for until then."""
        if self.stages is None or self.stages.baseline is not None:
            raise PreconditionError("the baseline is not complete", "pgcdp status tells how far it is")
        self.shutdown_until = time.monotonic() + SHUTDOWN_SECONDS
        while self.asking is not None:
            await asyncio.wait({self.asking})
        return {"waiting": True}

    async def _grow(self, volume: int, size: int) -> dict[str, Any]:
        """A volume, by number, is to become larger: the store is ready for it when this is answered."""
        if self.stages is None or self.stages.baseline is not None:
            raise PreconditionError("the baseline is not complete", "pgcdp status tells how far it is")
        await self._in_worker(self.stages.grow, volume, size)
        return {"bytes": size}

    async def _until(self, happened: Callable[[], bool]) -> None:
        """Wait for a turn after which it has happened. Raises PgcdpError with what went wrong before it did."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.error is not None or happened())
        if not happened():
            raise PgcdpError(f"no boundary was stored: {self.error}", f"look at {self.config.paths.agent_log}")

    def _reached(self, checkpoint_lsn: int) -> bool:
        stages = self.stages
        newest = stages.newest if stages else None
        if stages is None or newest is None or newest.write <= max(self.gone_back, stages.finder.rewound):
            return False
        return newest.checkpoint_lsn >= checkpoint_lsn

    def describe(self) -> dict[str, Any]:
        """The agent's part of `pgcdp status`."""
        reply: dict[str, Any] = {"pid": os.getpid(), "error": self.error, "phase": "starting"}
        stages = self.stages
        if stages is None:
            return reply
        # The worker goes from one to the next meanwhile: each is looked at once.
        baseline, newest, opened = stages.baseline, stages.newest, stages.opened
        if baseline is not None:
            phase = "baseline" if stages.baseline_end is None else "checkpoint"
            return {**reply, "phase": phase, "baseline": {"done": baseline.done, "total": baseline.total}}
        if newest is None or opened is None:
            return reply
        return {
            **reply,
            "phase": "following",
            "boundary": newest.number,
            "stored_write": newest.write,
            "stored_time_ns": newest.time_ns,
            "taken_write": opened.last_write,
            "look_seconds": round(time.monotonic() - self.whole_look_at),
            "no_look": self.no_look,
            "waiting": self.waiting,
            "outside": outside_json(self.outside),
            "not_expired": self.not_expired,
        }


def without_put_back(store: Store, config: Config, status: EngineStatus) -> Store:
    """The store without what it noted of a volume that was put back at the last moment, with the store perhaps away.

    Settings of before alone do not say so: of a volume that is captured the store knows what nobody else does.
    """
    if len(status.volumes) != len(config.volumes):
        return store
    for volume in store.volumes[len(config.volumes) :]:
        if volume in store.in_use:
            store = store.unmounted(volume.name)
    return store


def outside_json(found: Sequence[Outside] | None) -> list[dict[str, str]] | None:
    """What lies outside of a set."""
    return None if found is None else [{"name": each.name, "place": os.fspath(each.place)} for each in found]


def facts(config: Config) -> dict[str, Any]:
    """What store.json keeps beside the volumes, so that the store alone is enough to restore from."""
    cluster = config.cluster
    return {
        "pgdata": os.fspath(config.pgdata),
        "cluster": {
            "version": cluster.version,
            "system_identifier": cluster.system_identifier,
            "owner": cluster.owner,
            "port": cluster.port,
        },
        "filesystems": {volume.name: volume.fs for volume in config.volumes},
        "mountpoints": {volume.name: os.fspath(volume.mountpoint) for volume in config.volumes},
    }


def main(set_name: str) -> int:
    """`pgcdp agent SET`: serve in the foreground, log to the set's agent log; the exit code."""
    config = load_config(set_name)
    log.start(config.paths.agent_log)
    give_way()
    keep_freed_memory()
    with FileLock(config.paths.agent_lock, f"the agent of set {set_name}"):
        asyncio.run(Agent(config).run())
    return 0
