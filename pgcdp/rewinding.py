"""Rewind production in place: `pgcdp restore --in-place`, and what is left of it after a kill.

The step that it is at lies in the set's state directory, durably, before that step begins:

    stop    Postgres stopped at its shutdown checkpoint, which is cut at, unmounted, mark               | put back
    write   begin record, the blocks that differ, end record; nothing is mounted                        | finished, or
    start   mounted, started once by itself for a timeline of its own                                   | gone back
    run     started as the user has it                                                                  | finished

What a kill leaves in `stop` is put back: nothing has changed. In `write` and `start` it is finished by `up`, or another
rewind takes its place, such as the one back to where it began.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pgcdp import fsio, log, proc, room_at_point, service
from pgcdp.capture import attach
from pgcdp.capture.control import EngineClient, EngineStatus
from pgcdp.capture.outside import find_outside, takes_in
from pgcdp.config import Config
from pgcdp.errors import DamageError, HalfWrittenError, PgcdpError, PreconditionError
from pgcdp.forecast import journal_disk
from pgcdp.opening import binaries_of, engine_status, source_of
from pgcdp.postgres import cluster, timelines
from pgcdp.postgres.control import Control, State
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery.links import own_places
from pgcdp.recovery.restored_spaces import created
from pgcdp.recovery.rewind import check_devices, most_bytes, write_back
from pgcdp.recovery.scratch import elsewhere, mounted
from pgcdp.recovery.source import Source
from pgcdp.sets import SetPaths
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import TIMELINES, Store
from pgcdp.store.rewinds import point_name
from pgcdp.units import format_size

_log = log.get(__name__)

CUT_SECONDS = 600.0
"""How long the boundary at the shutdown checkpoint may take to be stored."""
TELL_SECONDS = 2.0
"""What is waited for longer is told."""
SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Pending:
    """A rewind under way. `mark`: the name in front of it; `written`: bytes, once that is done."""

    step: str
    point: RecoveryPoint
    mark: str
    written: int = 0

    def save(self, paths: SetPaths) -> None:
        """Make it the set's state, durably."""
        fsio.write_json(paths.rewind_state, asdict(self))


def pending(paths: SetPaths) -> Pending | None:
    """The rewind that a kill or an error has left. Raises DamageError when its file is not whole."""
    try:
        content = fsio.read_json(paths.rewind_state)
    except FileNotFoundError:
        return None
    known = {name: content[name] for name in Pending.__dataclass_fields__}
    return Pending(**{**known, "point": RecoveryPoint(**known["point"])})


def rewind(config: Config, point: RecoveryPoint, below: Path, progress: Report = silent) -> tuple[Pending, float]:
    """Bring production to `point`, which the caller has shown and asked about.

    Returns what was done, and for how many seconds production was down. Scratch files lie below `below`. Raises
    PreconditionError, with production as it was, when it cannot begin.
    """
    paths = config.paths
    with fsio.disk_errors(_then(config)), attach.hold(paths):
        left = pending(paths)
        _refuse_point(config, point, below, progress)
        if left is not None and left.step in ("write", "start"):
            capture = attach.start_capture(config, progress, captured=lambda: service.start(config))
            _refuse_full(config, capture.next_status(), point, below)
            _log.warning("the rewind to write %d is given up for one to write %d", left.point.write, point.write)
            begun = time.monotonic()
            return _finish(config, _begin_anew(config, left, point), below, progress), time.monotonic() - begun
        if left is not None:
            _put_back(config, progress) if left.step == "stop" else _finish(config, left, below, progress)
        attach.refuse_pending(paths)
        attach.attach(config, progress, captured=lambda: service.start(config))
        service.start(config)
        attach.start_cluster(config, progress)
        _refuse(config, point, below, progress)
        progress(Progress("cutting"))  # so that the next boundary is near
        service.ask(config.paths, "cut", timeout=None)
        _await_image(config, progress)
        begun = time.monotonic()
        name = time.strftime("before-rewind-%Y%m%d%H%M%S", time.gmtime())
        doing = Pending("stop", point, name)
        doing.save(paths)
        try:
            source = source_of(config, engine_status(config))
            with source.held():  # from when it is pending on, retention lets go of nothing; it may have, before
                source.refuse_let_go(point)
            _stop(config, name, progress)
        except BaseException:
            _put_back(config, progress)
            raise
        doing = replace(doing, step="write")
        doing.save(paths)
        return _finish(config, doing, below, progress), time.monotonic() - begun


def resume(config: Config, below: Path, progress: Report = silent) -> Pending | None:
    """What `up` does first: finish what a kill has left, or put it back when nothing has changed.

    None: there was none, or it was put back. Raises what the rewind does; nothing is mounted then.
    """
    left = pending(config.paths)
    if left is None:
        return None
    with fsio.disk_errors(_then(config)), attach.hold(config.paths):
        left = pending(config.paths)
        if left is None:
            return None
        if left.step == "stop":
            _put_back(config, progress)
            return None
        progress(Progress(f"finishing the rewind to write {left.point.write}"))
        return _finish(config, left, below, progress)


def _then(config: Config) -> str:
    return f"mend that, then pgcdp up {config.name}: it finishes the rewind, or puts back what had not begun to write"


def _refuse_point(config: Config, point: RecoveryPoint, below: Path, progress: Report) -> None:
    """Raises PreconditionError for a point to which production cannot be brought."""
    source = source_of(config, engine_status(config))
    with mounted(source, point, below, progress) as pgdata:
        _refuse_outside(config, source, point, pgdata)
        if cluster.read_control(pgdata).wal_level == 0:
            raise PreconditionError(
                f"wal_level was minimal at write {point.write}: Postgres cannot come up on a new timeline there",
                "pgcdp clone and pgcdp restore --to-directory open it; rewind to where wal_level was replica",
            )


def _refuse_outside(config: Config, source: Source, point: RecoveryPoint, pgdata: Path) -> None:
    """Where the cluster had data outside of the set, or of a volume that came later: nobody has captured it, and
    Postgres would go on with the files of now, in which transactions of the future are and xids are given twice.

    A tablespace of that point is one that has its link there, or gets it when recovery replays how it was made. Before
    it was made, there is nothing to bring back.
    """
    store = source.store
    places = {os.path.normpath(store.extra["mountpoints"][name]): name for name in store.since}
    later = {place: name for place, name in places.items() if point.write < store.since[name]}
    own = elsewhere(source, point, pgdata)
    for space in cluster.tablespace_links(pgdata).values():
        _refuse_later(source, point, later.get(os.path.normpath(space)))
    wal = pgdata / "pg_wal"
    wal = own_places(pgdata, own).get(wal, wal)
    room_at_point.refuse_full(config, source, point, pgdata, wal)
    for space in created(pgdata, wal, binaries_of(source, config.name)).values():
        place = Path(os.path.normpath(space))
        _refuse_later(source, point, later.get(os.fspath(place)))
        if not any(place.is_relative_to(each) for each in own):
            raise PreconditionError(
                f"recovery makes a tablespace in {place} at write {point.write}, which is on no volume of the set",
                "choose a point before it was made, or one from which on it was in the set",
            )


def _refuse_later(source: Source, point: RecoveryPoint, volume: str | None) -> None:
    if volume is not None:
        place, since = source.store.extra["mountpoints"][volume], source.store.since[volume]
        raise PreconditionError(
            f"volume {volume} is in the set since write {since}: what the tablespace in {place} held at write "
            f"{point.write} was captured by nobody",
            f"choose a point from write {since} on, or one before that tablespace was made",
        )


def _refuse(config: Config, point: RecoveryPoint, below: Path, progress: Report) -> None:
    """Raises PreconditionError for what would stop it on its way; nothing is changed before."""
    progress(Progress("checking"))
    control = cluster.read_control(config.pgdata)
    if control.state == State.IN_ARCHIVE_RECOVERY:
        raise PreconditionError(
            f"the cluster at {config.pgdata} is a standby", "rewind its primary, or promote it first"
        )
    if control.wal_level == 0:
        raise PreconditionError(
            "wal_level is minimal: Postgres could not come up on a new timeline to undo the rewind",
            "ALTER SYSTEM SET wal_level = replica; and restart Postgres; what is behind that can be rewound to",
        )
    outside = find_outside(config.pgdata, [volume.mountpoint for volume in config.volumes])
    if outside:
        raise PreconditionError(
            f"{outside[0].name} lies outside of the set, in {outside[0].place}: it is captured by nobody, so that the "
            "rewind could not be undone",
            takes_in(config.name, outside),
        )
    service.await_following(config.paths)  # it may have been started just now, for this
    _refuse_full(config, EngineClient(config.paths.control).next_status(), point, below)


def _refuse_full(config: Config, status: EngineStatus, point: RecoveryPoint, below: Path) -> None:
    """Raises PreconditionError when what is written back may not find room: it is captured like all else.

    The store gets it, and the backward increment of the same blocks. The journal holds all of it, or as much as its
    limit allows, which the agent then makes room in; what its disk has not, writes would wait for with production down.
    """
    need = most_bytes(source_of(config, status), point, below) + SPARE_BYTES
    stored, journalled = 2 * need, min(need, status.journal_limit - status.journal_bytes)
    shared = config.store.stat().st_dev == config.journal.stat().st_dev
    for what, place, have, wanted in (
        ("journal", config.journal, journal_disk(config), journalled),
        ("store", config.store, fsio.free_space(config.store), stored + (journalled if shared else 0)),
    ):
        if have < wanted:
            raise PreconditionError(
                f"the {what} at {place} has {format_size(have)} free on its disk, the rewind may need "
                f"{format_size(wanted)}",
                "free space there; what is written back is captured like all else",
            )


def _stop(config: Config, name: str, progress: Report) -> None:
    """Postgres stopped with its shutdown checkpoint as a boundary, unmounted, the mark set."""
    service.ask(config.paths, "cut_at_shutdown")
    attach.stop_cluster(config, progress)
    control = cluster.read_control(config.pgdata)
    if control.state != State.SHUT_DOWN:
        raise PreconditionError(f"Postgres at {config.pgdata} did not shut down in order", "see its log")
    _wait_boundary(config, control.checkpoint_lsn, progress)
    timelines.keep(config.pgdata / "pg_wal", config.store / TIMELINES, _archives(config))
    attach.unmount(config, progress)
    EngineClient(config.paths.control).mark(name)


def _await_image(config: Config, progress: Report) -> None:
    """Until the image is at the newest boundary: while somebody reads it behind that, none is cut, and Postgres would
    stay stopped for a boundary at its shutdown that does not come.
    """
    begun = time.monotonic()
    while True:
        state = service.ask(config.paths, "status")
        if state["error"]:
            raise PreconditionError(f"the agent of {config.name} fails: {state['error']}", state.get("hint"))
        if state["phase"] == "following" and not state.get("behind"):
            return
        if time.monotonic() - begun > TELL_SECONDS:  # it may just be moving
            progress(Progress("waiting for what reads the image, such as a restore to files"))
        time.sleep(0.1)


def _wait_boundary(config: Config, checkpoint_lsn: int, progress: Report) -> None:
    progress(Progress("storing the last writes"))
    deadline = time.monotonic() + CUT_SECONDS
    store = Store.open(config.store, config.set_id_bytes)
    durable = EngineClient(config.paths.control).next_status().durable_write
    while True:
        state = service.ask(config.paths, "status")
        number = max(store.interval_numbers(), default=0)
        if number and Bundle.open(store, number).interval.boundary.checkpoint_lsn == checkpoint_lsn:
            return
        passed = state.get("behind") and state["taken_write"] >= durable  # the image was read, so none was cut there
        if state["error"] or passed or time.monotonic() > deadline:
            raise PreconditionError(
                f"no boundary was cut at the shutdown of Postgres: {state['error'] or 'a reader may hold the image'}",
                f"see {config.paths.agent_log}; end what reads the store, then run this again",
            )
        time.sleep(0.05)


def _put_back(config: Config, progress: Report) -> None:
    """Nothing has changed yet: production goes on."""
    progress(Progress("putting everything back"))
    attach.attach(config, progress, captured=lambda: service.start(config))
    attach.start_cluster(config, progress)
    _forget(config.paths)


def _forget(paths: SetPaths) -> None:
    fsio.remove_durably(paths.rewind_state)


def _begin_anew(config: Config, left: Pending, point: RecoveryPoint) -> Pending:
    """Another point in place of the one that a killed rewind was on its way to."""
    made = replace(left, step="write", point=point, written=0)
    made.save(config.paths)
    return made


def _finish(config: Config, doing: Pending, below: Path, progress: Report) -> Pending:
    """From whatever a kill has left of `write` or `start` to a cluster that runs."""
    if doing.step == "write":
        client = attach.start_capture(config, progress, captured=lambda: service.start(config))
        devices = attach.attach_devices(config, progress)
        name = point_name(doing.point.write, doing.point.lsn)
        check_devices(source_of(config, client.next_status()), devices)
        client.rewind_record("begin", name)
        source = source_of(config, EngineClient(config.paths.control).next_status())
        with service.kept(config):
            try:
                written = write_back(source, doing.point, devices, below, progress)
            except OSError as error:
                raise PgcdpError(
                    f"writing back to {', '.join(map(str, devices))} failed: {error.strerror or error}",
                    f"look at {config.paths.engine_log}; pgcdp up {config.name} goes on with it",
                ) from error
            except DamageError as error:
                raise HalfWrittenError(
                    f"{error.message}; production is down, written back in part",
                    f"pgcdp restore {config.name} --in-place --target-name {doing.mark} brings it back as it was",
                ) from error
        client.rewind_record("end", name)
        doing = replace(doing, step="start", written=written)
        doing.save(config.paths)
    attach.attach(config, progress, captured=lambda: service.start(config))
    service.start(config)
    if doing.step == "start":
        room_at_point.give(config, progress)
        _open_timeline(config, doing, progress)
        doing = replace(doing, step="run")
        doing.save(config.paths)
    attach.start_cluster(config, progress)
    _forget(config.paths)
    return doing


def _open_timeline(config: Config, doing: Pending, progress: Report) -> None:
    """Start Postgres once by itself, so that it comes up on a timeline never used before; done when it has."""
    pgdata, facts = config.pgdata, config.cluster
    place, pg_wal, user = config.store / TIMELINES, config.pgdata / "pg_wal", proc.user_named(config.cluster.owner)
    if cluster.find_started(pgdata) is not None:  # what a kill has left of that start
        with suppress(PreconditionError):  # in the midst of recovery it does not end cleanly
            cluster.stop(pgdata, attach.STOP_SECONDS)
    control = cluster.read_control(pgdata)
    used = timelines.known(place)
    if control.timeline not in (1, *used) and control.state == State.SHUT_DOWN:
        _switched(config, control.timeline, control.wal_segment_size)
        return
    progress(Progress("starting Postgres on a new timeline"))
    for path in (pgdata / "postmaster.pid", pgdata / "standby.signal", *pgdata.glob(".s.PGSQL.*")):
        path.unlink(missing_ok=True)  # of a postmaster that ran at the point, or was killed in its start
    timelines.put(place, pg_wal, user)
    timelines.ask_recovery(pgdata, user)
    with timelines.private_socket(pgdata, user) as sockets:
        own = {**timelines.FIRST_START, "unix_socket_directories": str(sockets)}
        options = [word for name, value in own.items() for word in ("-c", f"{name}={value}")]
        try:
            cluster.start([*facts.command_line, *options], pgdata, user, facts.log_file, attach.STOP_SECONDS)
        except PreconditionError as error:
            raise _not_up(config, doing, error.message) from None
        control = _wait_promoted(config, doing)
        cluster.stop(pgdata, attach.STOP_SECONDS)
    if control.timeline in (1, *used):
        raise PgcdpError(
            f"Postgres came up on timeline {control.timeline}, which was used before", f"look at {facts.log_file}"
        )
    _switched(config, control.timeline, control.wal_segment_size)


def _wait_promoted(config: Config, doing: Pending) -> Control:
    """Until recovery has ended with its checkpoint; Postgres says that it is ready for standbys' sake before that."""
    deadline = time.monotonic() + attach.STOP_SECONDS
    while True:
        running = cluster.find_postmaster(config.pgdata)
        control = cluster.read_control(config.pgdata)
        if control.state == State.IN_PRODUCTION:
            return control
        if running is None or time.monotonic() > deadline:
            raise _not_up(config, doing, cluster.last_words(config.cluster.log_file))
        time.sleep(0.05)


def _not_up(config: Config, doing: Pending, said: str) -> PreconditionError:
    return PreconditionError(
        f"Postgres did not come up as it was at the recovery point: {said}",
        f"see {config.cluster.log_file}; pgcdp up {config.name} tries again, "
        f"pgcdp restore {config.name} --in-place --target-name {doing.mark} goes back",
    )


def _switched(config: Config, timeline: int, segment_bytes: int) -> None:
    pg_wal, archives = config.pgdata / "pg_wal", _archives(config)
    timelines.switched(pg_wal, timeline, segment_bytes, archives, proc.user_named(config.cluster.owner))
    timelines.keep(pg_wal, config.store / TIMELINES, archives)


def _archives(config: Config) -> bool:
    """Whether the stopped cluster's configuration has an archive."""
    words = [*config.cluster.command_line, "-C", "archive_mode"]
    done = proc.run(words, user=proc.user_named(config.cluster.owner), env=cluster.environment())
    return done.stdout.strip() != "off"
