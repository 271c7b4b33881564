"""Opening a clone, and moving it to another point."""

from __future__ import annotations

import os
import select
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pgcdp import proc
from pgcdp.capture.control import EngineClient, EngineGone
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres import cluster, session
from pgcdp.postgres.cluster import Binaries
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery import places, sandbox, sandbox_settings, scratch
from pgcdp.recovery.clone import (
    RECORD,
    Access,
    Clone,
    boot_id,
    locked,
    remove,
    remove_if_empty,
    remove_unfinished,
    take_down,
)
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import leave_open, raise_found

FORWARDER = Path(__file__).with_name("forward.py")
_LOOPBACK = "127.0.0.1"
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
"""What a client may ask first. Postgres answers with one byte, whoever asks."""
_ANSWER_SECONDS = 60.0


class NameTaken(PreconditionError):
    """There is a clone of that name."""


def create(
    source: Source,
    clone: Clone,
    binaries: Callable[[], Binaries],
    hide: Sequence[Path] = (),
    progress: Report = silent,
) -> tuple[Clone, sandbox.Recovery]:
    """Open `clone.point` at `clone.place`, which must not exist. Nothing is left of it when that fails.

    `binaries` are asked for when they are needed: to look at them takes as long as to open the view.
    Raises NameTaken, PreconditionError for a port that is taken, DamageError for stored bytes that are wrong.
    """
    proc.check_root()
    with _listening(clone.access.port) as listener:
        with places.alone(clone.place.parent):
            remove_unfinished(clone.place.parent)
            try:
                clone.place.mkdir(mode=0o700)
            except FileExistsError:
                raise _taken(clone) from None
            locked = places.lock(clone.place)
        try:
            clone.place.chmod(0o711)  # Postgres's user passes through to the mount
            clone.save()
            return _open(source, clone, binaries, hide, listener, progress)
        except BaseException:
            with suppress(PgcdpError):
                remove(clone.place)
                remove_if_empty(clone.place.parent)
            raise
        finally:
            os.close(locked)


def move(
    source: Source,
    clone: Clone,
    point: RecoveryPoint,
    binaries: Callable[[], Binaries],
    hide: Sequence[Path] = (),
    progress: Report = silent,
) -> tuple[Clone, sandbox.Recovery]:
    """Close a clone and open it again at `point`, under its name and port. What was written to it is gone.

    Raises PreconditionError, with nothing changed, when it is not as `clone` says any more.
    """
    with locked(clone.place):
        if Clone.load(clone.place) != clone:
            raise PreconditionError(
                f"clone {clone.name} was moved by another command meanwhile", "run this again; it goes on from there"
            )
        take_down(clone.place)
        for left in clone.place.iterdir():
            if left.name != RECORD:
                _delete(left)
        fresh = replace(clone, point=point, dsn="", processes=(), outside=(), boot_id=boot_id()).save()
        try:
            with _listening(clone.access.port) as listener:
                return _open(source, fresh, binaries, hide, listener, progress)
        except BaseException:  # it is shown as dead, at the point that it was to have, and can be moved again
            with suppress(PgcdpError):
                take_down(clone.place)
            raise


def _open(
    source: Source,
    clone: Clone,
    binaries: Callable[[], Binaries],
    hide: Sequence[Path],
    listener: socket.socket | None,
    progress: Report,
) -> tuple[Clone, sandbox.Recovery]:
    files = leave_open(source, clone.point, clone.place, progress)
    client = EngineClient(clone.place / "control")
    settings = source.settings(clone.point)
    try:
        pgdata = scratch.leave_mounted(source, clone.point, clone.place, files, progress)
        progress(Progress("starting postgres on it"))
        box = sandbox.start(
            pgdata, settings, parent=clone.place, binaries=binaries(),
            elsewhere=scratch.elsewhere(source, clone.point, pgdata), hide=hide,
            override=_settings(clone.access), hba=_hba(clone.access, settings), name="postgres",
        )  # fmt: skip
    except Exception as error:
        with suppress(EngineGone):
            raise_found(client, error)
        raise
    raise_found(client, None)
    outside = () if box.socket_directory.is_relative_to(clone.place) else (box.socket_directory,)
    dsn = box.address()
    clone = replace(clone, dsn=dsn.text("postgres"), outside=outside)
    if listener is not None:
        forwarder = _forward(listener, box)
        port = listener.getsockname()[1]
        clone = replace(
            clone,
            dsn=session.dsn_text(_LOOPBACK, port, box.superuser, "postgres"),
            access=replace(clone.access, port=port),
            processes=((forwarder, proc.start_time(forwarder) or 0),),
        )
    return clone.save(), box.recovery


def _settings(access: Access) -> Mapping[str, str]:
    return {
        **({"listen_addresses": _LOOPBACK} if access.port is not None else {}),
        **({"default_transaction_read_only": "on"} if access.read_only else {}),
        "cluster_name": "pgcdp clone",
    }


def _hba(access: Access, settings: Mapping[str, Any] | None) -> list[str]:
    return sandbox_settings.hba_lines(settings, access.trust) if access.port is not None else []


@contextmanager
def _listening(port: int | None) -> Iterator[socket.socket | None]:
    """A socket that listens on the port of this machine's loopback; 0: any that is free."""
    if port is None:
        yield None
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((_LOOPBACK, port))
            door.listen(128)
        except OSError as error:
            raise PreconditionError(
                f"port {port} of {_LOOPBACK} cannot be used: {error.strerror}", "choose another --port, or 0 for any"
            ) from None
        yield door


def _forward(listener: socket.socket, box: sandbox.Sandbox) -> int:
    """Lead connections to the clone's Postgres, whose network is its own; gives the process id when it answers there.

    Raises PreconditionError, with the process ended, when it does not.
    """
    postmaster = cluster.find_postmaster(box.pgdata)
    if postmaster is None:
        raise PreconditionError(f"postgres on {box.pgdata} ended just after it had started", f"see {box.log_file}")
    log = box.scratch / "forward.log"
    words = [listener.fileno(), postmaster.pid, sandbox.PORT, box.user.uid, box.user.gid]
    pid = proc.spawn([sys.executable, "-I", str(FORWARDER), *map(str, words)], output=log, keep_fds=[listener.fileno()])
    try:
        _await_answer(listener.getsockname()[1], pid, log)
    except BaseException:
        proc.end(pid)
        raise
    return pid


def _await_answer(port: int, forwarder: int, log: Path) -> None:
    """Wait until Postgres answers at the port: the door is open before somebody stands behind it."""
    with suppress(ProcessLookupError, ConnectionError), ExitStack() as stack:
        ended = os.pidfd_open(forwarder)
        stack.callback(os.close, ended)
        asking = stack.enter_context(socket.create_connection((_LOOPBACK, port)))
        asking.sendall(_SSL_REQUEST)
        ready, _, _ = select.select([asking.fileno(), ended], [], [], _ANSWER_SECONDS)
        if asking.fileno() in ready and asking.recv(1):
            return
    raise PreconditionError(
        f"nobody answers at port {port} of {_LOOPBACK}: {cluster.last_words(log)}", "run this again"
    )


def _taken(clone: Clone) -> NameTaken:
    with suppress(PgcdpError, OSError):
        root = Clone.load(clone.place).root
        if root != clone.root:
            return NameTaken(
                f"a clone {clone.name} of this store exists already, made with PGCDP_ROOT={root}",
                "choose another --name, or destroy it there",
            )
    return NameTaken(f"a clone {clone.name} exists already", f"choose another --name, or: pgcdp destroy {clone.name}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
