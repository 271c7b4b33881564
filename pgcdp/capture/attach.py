"""Attach a protected cluster and take it down: what `pgcdp up` and `pgcdp down` do around the agent.

Order of up:    clean leftovers -> engine (replays its journal) -> loop devices -> mounts -> Postgres.
Order of down:  Postgres -> syncfs -> unmount -> detach -> engine (applies all, marks its journal clean).
Each step looks at what is there, so both may be repeated after a kill at any place.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pgcdp import fsio, log, proc
from pgcdp.capture import backings, fingerprint, held, home, renewing, same_parts, sharing, volumes
from pgcdp.capture.control import EngineBusy, EngineClient
from pgcdp.capture.journal import Journal
from pgcdp.capture.keeper import Keeper
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.postgres import cluster
from pgcdp.progress import Progress, Report, silent
from pgcdp.sets import SetPaths

DEAD_OPTIONS = frozenset({"ro", "emergency_ro", "shutdown"})
"""Mount options that tell that a filesystem has given up after I/O errors (pgcdp never mounts a set read-only)."""
BUSY_SECONDS = 20.0
STOP_SECONDS = 600.0
"""A shutdown checkpoint of large shared buffers takes minutes on slow disks."""
T = TypeVar("T")
_log = log.get(__name__)


def nothing() -> None:
    """The default of `captured`."""


def up(config: Config, progress: Report = silent, captured: Callable[[], None] = nothing) -> None:
    """Attach, mount and start the cluster; afterwards the engine captures and Postgres runs.

    `captured` is called as soon as the engine answers, before anything is mounted or started: mounts and Postgres may
    wait for room in the journal, which the agent makes.

    After a crash of any part: ends a postmaster on a dead filesystem, unmounts, detaches, replays. Nothing is done
    when all is up. Raises PreconditionError for what must be mended first, DamageError for a damaged journal.
    """
    with fsio.disk_errors(f"mend that, then run pgcdp up {config.name} again"), hold(config.paths):
        refuse_pending(config.paths)
        attach(config, progress, captured=captured)
        home.settle(config)
        start_cluster(config, progress)


def down(config: Config, progress: Report = silent) -> None:
    """Stop Postgres (fast), unmount, detach, stop the engine with its journal clean. Nothing is done when all is down.

    When the engine has died, with this machine or before, its journal is replayed first, so that the volumes are plain
    afterwards. Raises PreconditionError when they are not.
    """
    with fsio.disk_errors(_then_down(config)), hold(config.paths):
        refuse_pending(config.paths)
        if not EngineClient(config.paths.control).alive() and not _goes_on(config, progress):
            if not _anything_left(config) and _journal_is_clean(config):
                return
            clean_leftovers(config, progress)
            progress(Progress("replaying the journal"))
            _start_capture(config)
        elif is_attached(config):
            stop_cluster(config, progress)
        else:
            end_postgres(config, progress)
        detach(config, progress)
        if not _journal_is_clean(config):
            raise PreconditionError(
                f"the volumes of {config.name} lack writes that {config.journal} holds: capture could not apply them",
                f"look at {config.paths.engine_log}, mend that, then pgcdp up {config.name}; mount nothing before",
            )


def quiesce(config: Config, progress: Report = silent) -> None:
    """The first step of `down` alone: stop Postgres while the agent still makes room in the journal."""
    with fsio.disk_errors(_then_down(config)), hold(config.paths):
        refuse_pending(config.paths)
        if EngineClient(config.paths.control).alive() and is_attached(config):
            stop_cluster(config, progress)


def _then_down(config: Config) -> str:
    return f"mend that, then run pgcdp down {config.name} again"


@contextlib.contextmanager
def hold(paths: SetPaths) -> Iterator[None]:
    """The lock that protect, unprotect, up and down of a set hold. Raises PreconditionError naming who has it.

    A capture process that dies meanwhile is replaced (keeper.py): what is done inside may wait for it, also without an
    agent.
    """
    paths.lock.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with fsio.FileLock(paths.lock, "another pgcdp protect, unprotect, up or down"), Keeper(paths):
        yield


def refuse_pending(paths: SetPaths) -> None:
    """Raises PreconditionError when a killed protect, unprotect or rewind waits to be finished."""
    if paths.extend_state.exists():
        raise PreconditionError(
            f'taking a tablespace into "{paths.name}" was interrupted',
            f"pgcdp up {paths.name} finishes it or puts back",
        )
    if paths.heal_state.exists():
        raise PreconditionError(
            f'taking in what was changed on the volumes of "{paths.name}" was interrupted',
            f"pgcdp up {paths.name} finishes it; nothing is mounted before",
        )
    if paths.remake_state.exists():
        raise PreconditionError(
            f'writing volumes of "{paths.name}" anew was interrupted: they are not what they are to be',
            f"pgcdp up {paths.name} finishes it, or says how; nothing is captured or mounted before",
        )
    if paths.rewind_state.exists():
        raise PreconditionError(
            f'a rewind in place of "{paths.name}" was interrupted: its volumes may be neither what they were nor what '
            "they are to be, and are not mounted",
            f"pgcdp up {paths.name} finishes it",
        )
    if paths.protect_state.exists():
        doing = fsio.read_json(paths.protect_state)["doing"]
        raise PreconditionError(
            f'{doing} of "{paths.name}" was interrupted',
            f"run pgcdp {doing} {paths.name} again: it finishes or puts back",
        )


def attach(config: Config, progress: Report = silent, captured: Callable[[], None] = nothing) -> EngineClient:
    """`up` without Postgres."""
    client = EngineClient(config.paths.control)
    _take_over(config, progress)
    if client.alive():
        captured()
    if is_attached(config):
        return client
    for volume in config.volumes:
        _refuse_foreign(config, volume)
    if not client.alive():
        if _anything_left(config):
            clean_leftovers(config, progress)
        progress(Progress("starting capture, replaying the journal"))
        client = _start_capture(config)
        captured()
    elif any(_our_mount(config, volume) and not _healthy(config, volume) for volume in config.volumes):
        end_postgres(config, progress)
        _unmount_all(config, progress)
        _detach_all(config)
    for volume, device in zip(config.volumes, attach_devices(config, progress), strict=True):
        if volumes.mount_at(volume.mountpoint) is None:
            _mount(config, volume, device)
    return client


def attach_devices(config: Config, progress: Report = silent) -> list[Path]:
    """The loop devices of all volumes, in order, attached where they were not; capture runs. Nothing is mounted."""
    progress(Progress("attaching the volumes"))
    devices = []
    for volume in config.volumes:
        file = config.paths.fuse / volume.name
        device = _loop_of(config, volume) or volumes.attach_loop(file, volumes.WRITE_THROUGH)
        volumes.set_cache_mode(device, volumes.WRITE_THROUGH)  # a restart may find one killed on its way
        devices.append(device)
    return devices


def unmount(config: Config, progress: Report = silent) -> None:
    """Unmount what is mounted of the set, after Postgres was stopped; the loop devices stay.

    Raises PreconditionError when a volume is mounted still, at another place or in another mount namespace.
    """
    _unmount_all(config, progress)
    for device in volumes.loops_over(config.paths.fuse):
        _retry(lambda busy=device: volumes.refuse_in_use(busy), PreconditionError)  # type: ignore[misc]


def start_capture(config: Config, progress: Report = silent, captured: Callable[[], None] = nothing) -> EngineClient:
    """Have the engine run, with nothing mounted: after a crash leftovers go first. `captured` as for `up`.

    Raises what `unmount` does.
    """
    client = EngineClient(config.paths.control)
    _take_over(config, progress)
    if not client.alive():
        if _anything_left(config):
            clean_leftovers(config, progress)
        progress(Progress("starting capture, replaying the journal"))
        client = _start_capture(config)
    captured()
    end_postgres(config, progress)
    unmount(config, progress)
    return client


def _start_capture(config: Config) -> EngineClient:
    """Every start on volumes that have been in use: not on one that somebody else wrote to meanwhile (truth 9)."""
    home.refuse_elsewhere(config)
    sharing.refuse_shared(config)
    fingerprint.refuse_changed(config)
    client = _started(config)
    same_parts.note(config)
    return client


def _started(config: Config) -> EngineClient:
    """Capture, where it can start. Else what it died of is raised, with how the set goes on without what is lost."""
    try:
        return held.start(config)
    except PgcdpError as error:
        more = _way_on(config)
        if more is None:
            raise
        raise type(error)(error.message, f"{error.hint}; {more}" if error.hint else more) from None


def _way_on(config: Config) -> str | None:
    """What is typed when a volume, or the journal, is lost; None when neither is."""
    paths = config.paths
    pending = any(each.exists() for each in (paths.extend_state, paths.heal_state, paths.rewind_state))
    for volume, _ in backings.problems(config, None):
        if pending:  # what waits to be finished needs it
            return f"bring its disk back; without it: pgcdp restore {config.name} --to-directory DIR"
        return backings.way_on(config, volume)
    if pending:
        return None
    if _stopped_in_order(config) and renewing.unreadable(config) is not None:
        return f"the volumes are whole: pgcdp up {config.name} --heal goes on with them, and shows what is lost first"
    return None


def detach(config: Config, progress: Report = silent) -> None:
    """`down` without stopping Postgres; raises PreconditionError when something still uses the mounts.

    How the volumes are then is written down, so that the next start knows whether somebody has changed them.
    """
    client = EngineClient(config.paths.control)
    control = fingerprint.control_place(config)
    _unmount_all(config, progress)
    progress(Progress("stopping capture"))
    _detach_all(config)
    synced, stood = fingerprint.keep(config, control), client.next_status() if client.alive() else None
    _retry(lambda: held.stop(config.paths), EngineBusy)
    if synced is not None and stood is not None:
        renewing.mark_again(config, stood, synced)
    same_parts.note(config)


def is_attached(config: Config) -> bool:
    """Whether the engine answers and every volume is mounted, readable and writable."""
    # In this order: while nobody serves a connection that a holder keeps, looking at a volume waits.
    return EngineClient(config.paths.control).alive() and all(_healthy(config, volume) for volume in config.volumes)


def clean_leftovers(config: Config, progress: Report = silent) -> None:
    """After a crash of the engine: end Postgres, unmount, detach, drop the dead FUSE mount.

    A holder that keeps its connection is ended first, so that nothing of that waits any more.
    """
    progress(Progress("cleaning up what a crash left"))
    held.cut_off(config.paths)
    end_postgres(config, progress)
    _unmount_all(config, silent, sync=False)
    _detach_all(config)
    volumes.unmount_lazily(config.paths.fuse)


def discard(config: Config) -> None:
    """Take everything down at once, without applying the journal: for volumes that are given up."""
    if not EngineClient(config.paths.control).alive():
        held.cut_off(config.paths)
    end_postgres(config)
    _unmount_all(config, silent, sync=False)
    _detach_all(config)
    held.cut_off(config.paths)
    volumes.unmount_lazily(config.paths.fuse)


def end_postgres(config: Config, progress: Report = silent) -> None:
    """Kill every Postgres process of the cluster on the set's mounts and await their ends.

    For filesystems that are dead, where Postgres can neither stop cleanly nor lose anything by it. Processes in a
    plain directory of the same name are not touched.
    """
    if any(_our_mount(config, volume) for volume in config.volumes):
        progress(Progress("ending what is left of Postgres"))
        cluster.kill_leftovers(config.pgdata)


def kill_and_wait(pid: int, timeout: float = 60.0) -> None:
    """SIGKILL and await the end. Raises PreconditionError when it does not end. Harmless when it is gone."""
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        if not select.select([ended], [], [], timeout)[0]:
            raise PreconditionError(
                f"process {pid} does not end after SIGKILL", f"see /proc/{pid}/stack for what it waits"
            )
    except ProcessLookupError:
        return
    finally:
        os.close(ended)


def syncfs(mountpoints: Sequence[Path]) -> None:
    """Everything written to these filesystems is on their devices when this returns."""
    for mountpoint in mountpoints:
        volumes.sync_filesystem(mountpoint)


def cluster_runs(config: Config) -> bool:
    """Whether a postmaster runs on the data directory."""
    return cluster.find_postmaster(config.pgdata) is not None


def start_cluster(config: Config, progress: Report = silent) -> None:
    """Start Postgres with the command line that it had before protect, and await that it takes connections.

    One that runs is left alone; one that hangs in its shutdown is ended and started anew.
    """
    facts = config.cluster
    running = cluster.find_started(config.pgdata)
    if running is not None and running.state == "stopping":
        progress(Progress("ending a Postgres that does not stop"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGQUIT)
        if not cluster.wait_gone(running, BUSY_SECONDS):
            cluster.kill_leftovers(config.pgdata)
        running = None
    progress(Progress("starting Postgres"))
    if running is not None:
        cluster.wait_ready(config.pgdata, running.pid, facts.log_file)
    else:
        _drop_stale_locks(config)
        cluster.start(facts.command_line, config.pgdata, proc.user_named(facts.owner), facts.log_file)


def _drop_stale_locks(config: Config) -> None:
    """Remove what keeps Postgres from starting though no process of the cluster is there.

    postmaster.pid and the socket's lock, each by itself, since a crash may leave either without the other: of a
    postmaster that is dead but not yet collected by init, which Postgres takes for alive, or empty, as a kill between
    making and writing leaves it.
    """
    if cluster.find_processes(config.pgdata):
        return
    told = config.pgdata / "postmaster.pid"
    locks = [told, Path(config.cluster.socket_directory) / f".s.PGSQL.{config.cluster.port}.lock"]
    lines = _lines(told)
    if len(lines) > 4 and lines[4]:  # the settings may have changed since
        locks.append(Path(lines[4]) / f".s.PGSQL.{lines[3]}.lock")
    for lock in locks:
        lines = _lines(lock)
        with contextlib.suppress(OSError):
            if not lines or _is_of_dead(lines, config.pgdata):
                lock.unlink()


def _lines(lock: Path) -> list[str]:
    """Those of a lock file of Postgres: process id, data directory, start, port, socket directory and more."""
    with contextlib.suppress(OSError):
        return lock.read_text(errors="replace").splitlines()
    return ["unreadable"]


def _is_of_dead(lines: list[str], pgdata: Path) -> bool:
    """Whether a lock names a process that has ended, and this data directory."""
    if len(lines) < 2 or not lines[0].isdecimal() or proc.exists(int(lines[0])):
        return False
    return os.path.realpath(lines[1]) == os.path.realpath(pgdata)


def stop_cluster(config: Config, progress: Report = silent, timeout: float = STOP_SECONDS) -> None:
    """Stop Postgres (fast), if it runs. Raises PreconditionError when it has not stopped after `timeout` seconds."""
    progress(Progress("stopping Postgres"))
    cluster.stop(config.pgdata, timeout)


def _take_over(config: Config, progress: Report) -> None:
    """Go on with the connection that a holder keeps for a capture process that died, if there is one.

    Raises what keeps the next one from starting; what is above the volumes waits then.
    """
    if held.takes_over(config.paths):
        progress(Progress("taking over from a capture process that died"))
        _started(config)


def _goes_on(config: Config, progress: Report) -> bool:
    """The same where nothing shall wait for ever: whether capture runs again."""
    try:
        _take_over(config, progress)
    except PgcdpError as error:
        _log.warning(
            "the connection of %s is given up, what is above it sees I/O errors: %s", config.name, error.message
        )
    return EngineClient(config.paths.control).alive()


def _healthy(config: Config, volume: VolumeConfig) -> bool:
    mount = volumes.mount_at(volume.mountpoint)
    if mount is None or mount.options & DEAD_OPTIONS:
        return False
    device = _loop_of(config, volume)
    return device is not None and os.fspath(device) == mount.source and volumes.device_answers(device)


def _loop_of(config: Config, volume: VolumeConfig) -> Path | None:
    return next(iter(volumes.loops_over(config.paths.fuse / volume.name)), None)


def _our_mount(config: Config, volume: VolumeConfig) -> volumes.Mount | None:
    """What is mounted at the volume's place, if it is a loop device over a file of this set's FUSE directory.

    When the FUSE mount has left the tree already, the kernel shows the file as if it lay in the root.
    """
    mount = volumes.mount_at(volume.mountpoint)
    backing = volumes.loop_backing(Path(mount.source)) if mount else None
    ours = (config.paths.fuse / volume.name, Path("/") / volume.name)
    return mount if backing in ours else None


def _refuse_foreign(config: Config, volume: VolumeConfig) -> None:
    mount = volumes.mount_at(volume.mountpoint)
    if mount is not None and _our_mount(config, volume) is None:
        raise PreconditionError(
            f"{volume.mountpoint} is mounted from {mount.source}, which is not of the set {config.name}",
            f"umount {volume.mountpoint}",
        )


def _stopped_in_order(config: Config) -> bool:
    """Whether the journal says so, as far as it can be read."""
    with contextlib.suppress(DamageError, OSError):
        mark = Journal(config.journal, config.set_id_bytes).applied_mark()
        return mark is not None and mark.clean
    return False


def _journal_is_clean(config: Config) -> bool:
    """Whether the volumes hold all that the journal does."""
    mark = Journal(config.journal, config.set_id_bytes).applied_mark()
    return mark is None or mark.clean


def _mount(config: Config, volume: VolumeConfig, device: Path) -> None:
    """Harmless when somebody does the same: mount(8) of a killed command lives on, and may be in the midst of it."""
    try:
        volumes.mount(device, volume.mountpoint, volume.fs)
    except proc.ProcessFailed:
        mount = _our_mount(config, volume)
        if mount is None or mount.source != os.fspath(device):
            raise


def _anything_left(config: Config) -> bool:
    return (
        any(_our_mount(config, volume) for volume in config.volumes)
        or bool(volumes.loops_over(config.paths.fuse))
        or volumes.mount_at(config.paths.fuse) is not None
    )


def _unmount_all(config: Config, progress: Report, sync: bool = True) -> None:
    mounted = [volume.mountpoint for volume in config.volumes if _our_mount(config, volume)]
    if not mounted:
        return
    progress(Progress("unmounting"))
    if sync:
        syncfs(mounted)
    for mountpoint in reversed(mounted):
        _retry(lambda place=mountpoint: volumes.unmount(place), PreconditionError)  # type: ignore[misc]


def _detach_all(config: Config) -> None:
    for device in volumes.loops_over(config.paths.fuse):
        _retry(lambda busy=device: volumes.detach_loop(busy), PreconditionError)  # type: ignore[misc]


def _retry(action: Callable[[], T], busy: type[Exception]) -> T:
    """Do it again while `busy` is raised: what a process held is let go a moment after it ended."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return action()
        except busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
