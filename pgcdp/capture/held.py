"""Start, end and replace a set's capture process and its holder: every change of these two goes through here.

One at a time: who starts or ends one of them holds `capture.lock`, so that the keeper (keeper.py), which replaces a
capture process that died, and a command that means it to end do not work against each other. What a start needs is
noted beside the sockets, so that the keeper needs nothing else: while a set is made or given a volume, its settings do
not say that yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pgcdp import config as settings
from pgcdp import fsio, log
from pgcdp.capture import children, engine, holder, same_parts, sharing, stale, volumes
from pgcdp.capture.control import EngineClient, EngineGone
from pgcdp.capture.journal import FORMAT, formats
from pgcdp.config import Config
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.sets import SetPaths

logger = log.get(__name__)

LOCK_SECONDS = 3600.0
"""How long a start may take that somebody else waits for: a replay on a slow disk."""
SETTLE_SECONDS = 60.0
"""How long a capture process that a killed command has started may take until it serves."""
HAND_OVER_SECONDS = 20.0
"""How long an upgrade waits for the running capture process to end by itself."""


class Broken(PreconditionError):
    """The connection cannot go on: nobody holds it."""


def start(config: Config, create: bool = False, *, put_back: bool = False) -> EngineClient:
    """Have capture run, behind a holder where there can be one; wait until it answers. Does nothing when it does.

    Where a holder keeps a connection, that one is taken over: what is mounted above it goes on. If that fails, the
    holder stays, and what is above it waits; else nothing is left. Raises what the engine died of.
    """
    paths = config.paths
    paths.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone(paths):
        client = EngineClient(paths.control)
        if _serves(config, client):
            return client
        if not create:
            same_parts.refuse_other(config)
            stale.refuse_stale(config)
        _note(config, put_back)
        if holder.find(paths) is not None:
            return engine.spawn_capture(config, create, put_back=put_back, holder=holder.socket_of(paths))
        if holder.missing() is not None:
            return engine.spawn_capture(config, create, put_back=put_back)
        _clear_mount(paths)
        engine.spawn_holder(paths, holder.socket_of(paths))
        try:
            return engine.spawn_capture(config, create, put_back=put_back, holder=holder.socket_of(paths))
        except BaseException:
            _end_both(paths)
            _clear_mount(paths)
            raise


def stop(paths: SetPaths) -> None:
    """Apply all, sync, mark the journal clean, unmount, end both. Raises EngineBusy while a volume file is open."""
    with alone(paths):
        EngineClient(paths.control).stop()
        if holder.find(paths) is None:
            holder.end(paths, at_once=False)
        else:
            holder.end(paths)  # another mount namespace has the mount still
        _clear_mount(paths)


def cut_off(paths: SetPaths) -> None:
    """Kill both: what is mounted above sees I/O errors from now on. Harmless when neither runs."""
    if paths.run.is_dir():
        with alone(paths):
            _end_both(paths)


def takes_over(paths: SetPaths) -> bool:
    """Whether no capture process runs, and a start would go on with the connection that a holder keeps."""
    return holder.find(paths) is not None and not EngineClient(paths.control).alive()


def mend(paths: SetPaths) -> bool:
    """What the keeper does: a capture process for a holder without one, a holder for a capture process whose own died.

    True when a capture process was started. Raises Broken when there is nothing to go on with, else what the engine
    died of.
    """
    with alone(paths):
        client = EngineClient(paths.control)
        kept = holder.find(paths)
        if client.alive():
            if kept is None:
                _hold_again(paths, client)
            return False
        if kept is None:
            raise Broken(f"no holder keeps the connection of {paths.name}", f"pgcdp up {paths.name}")
        config, put_back = noted(paths)
        if _serves(config, client):
            return False
        same_parts.refuse_other(config)
        engine.spawn_capture(config, put_back=put_back, holder=holder.socket_of(paths))
        return True


def swap(config: Config) -> None:
    """Replace the running capture process by the installed one; what is mounted above waits meanwhile.

    The running one takes no more requests, applies all and ends; if it does not within HAND_OVER_SECONDS, it is killed,
    and the next one replays. Raises PreconditionError, with nothing done, when the installed one cannot go on from it.
    """
    paths = config.paths
    with alone(paths):
        client = EngineClient(paths.control)
        refuse_swap(config)
        same_parts.refuse_other(config)
        running = holder.process_at(paths.control)
        if running is not None:
            try:
                engine.hand_over(client, running.ended, HAND_OVER_SECONDS)
            finally:
                os.close(running.ended)
        _note(config, False)
        engine.spawn_capture(config, holder=holder.socket_of(paths))


def note(config: Config) -> None:
    """Have whoever starts the next capture process know these settings, where one runs: a volume has grown.

    SET.toml says the same; but it may be damaged just then, and a volume that is shown smaller than its filesystem is
    would give I/O errors.
    """
    if _note_file(config.paths).exists():
        with alone(config.paths):
            _note(config, noted(config.paths)[1])


def noted(paths: SetPaths) -> tuple[Config, bool]:
    """With what capture was last started, with the settings of now where they are of the same volumes; `put_back`.

    Raises PreconditionError when nothing is noted.
    """
    try:
        content = fsio.read_json(_note_file(paths))
    except (OSError, DamageError):
        raise PreconditionError(
            f"it is not known how capture of {paths.name} was started", f"pgcdp up {paths.name}"
        ) from None
    config = settings.parse_config(content["config"], paths.name, _note_file(paths), paths.root)
    with suppress(PgcdpError):
        now = settings.load_config(paths.name)
        if [volume.name for volume in now.volumes] == [volume.name for volume in config.volumes]:
            config = now  # a volume may have grown since
    return config, bool(content["put_back"])


@contextmanager
def alone(paths: SetPaths) -> Iterator[None]:
    """Nobody else starts or ends capture or its holder inside. Raises PreconditionError after LOCK_SECONDS."""
    with fsio.FileLock(
        paths.run / "capture.lock", f"another start or end of capture of {paths.name}", wait=LOCK_SECONDS
    ):
        yield


def _serves(config: Config, client: EngineClient) -> bool:
    """Whether a capture process answers; waits for one that does not yet: whoever started it may have been killed.

    It is there before it has the journal's lock, has that to its end, and answers when it has replayed.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while not client.alive():
        try:
            if not sharing.captures_at(config.paths.control) and not fsio.is_locked(config.journal / "lock"):
                return False
        except OSError:  # the engine tells of it
            return False
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _note_file(paths: SetPaths) -> Path:
    return paths.run / "capture.json"


def _note(config: Config, put_back: bool) -> None:
    fsio.write_json(_note_file(config.paths), {"config": settings.render_config(config), "put_back": put_back})


def _end_both(paths: SetPaths) -> None:
    """The holder first: what it keeps would be taken over. One that replays does not answer yet."""
    holder.end(paths)
    found = holder.process_at(paths.control)
    if found is not None:
        children.kill(found.pid, found.ended)
    for pid in sharing.captures_at(paths.control):
        with suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            if pid in sharing.captures_at(paths.control):  # still: by now the number could be another process's
                children.kill(pid, ended)
            else:
                os.close(ended)


def _clear_mount(paths: SetPaths) -> None:
    """What is left of a mount whose connection has ended."""
    volumes.unmount_lazily(paths.fuse)


def _hold_again(paths: SetPaths, client: EngineClient) -> None:
    with suppress(EngineGone):
        status = client.status()
        if status.raw.get("held"):
            engine.spawn_holder(paths, holder.socket_of(paths), adopt=status)
            logger.warning("the holder of %s was gone, pid %d has the connection now", paths.name, _pid(paths))


def _pid(paths: SetPaths) -> int:
    found = holder.find(paths)
    return found.pid if found else 0


def refuse_swap(config: Config) -> None:
    """Raises PreconditionError where the installed engine could not take over from the running one."""
    paths = config.paths
    hint = f"pgcdp down {config.name} and pgcdp up {config.name}, with Postgres stopped meanwhile"
    status = EngineClient(paths.control).status()
    if holder.find(paths) is None or not status.raw.get("held"):
        why = holder.missing() or "it was started without one"
        raise PreconditionError(f"capture of {config.name} has no holder that would keep its connection: {why}", hint)
    unknown = sorted(formats(config.journal) - {FORMAT})
    if unknown:
        told = ", ".join(map(str, unknown))
        raise PreconditionError(
            f"the journal of {config.name} has format {told}, the installed version reads {FORMAT}",
            f"install a version that reads format {told}; the running one goes on meanwhile",
        )
    try:
        engine.run_engine(["hold", "--socket", os.fspath(holder.socket_of(paths)), "--fits"])
    except PreconditionError as error:
        raise PreconditionError(
            f"the installed version cannot go on from the running one: {error.message}", hint
        ) from None
