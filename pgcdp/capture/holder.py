"""The holder of a set: a process that keeps its FUSE connection while capture processes come and go.

On Linux 6.9 and newer the kernel sends what a capture process had taken and not answered to the next one, as long as
somebody keeps the connection open (docs/decisions/2026-11-27-holder.md). A holder is found at its socket in the set's
runtime directory, whatever else has died; what it gives there is in FORMAT.md 6.
"""

from __future__ import annotations

import mmap
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp.errors import PreconditionError
from pgcdp.sets import SetPaths

LEAST_KERNEL = (6, 9)
"""The first Linux that sends requests again (FUSE_NOTIFY_RESEND)."""
SOCKET = "holder.sock"
"""Where a holder listens, in the set's runtime directory."""
SWITCH = "PGCDP_HOLDER"
"""Environment variable: `off` does without a holder, as a kernel before LEAST_KERNEL does."""
DOOR_SECONDS = 5.0
"""How long a process that listens may take to let somebody in, or to say something."""
END_SECONDS = 60.0
_SO_PEERPIDFD = 77
_CREDENTIALS = struct.Struct("3i")
_HELLO = struct.Struct("<8sII")
_HELLO_MAGIC = b"PGCDPHLD"
_NOTE_BYTES, _COUNTS = 4096, struct.Struct("<QQ")
_COUNTS_AT = 544


@dataclass(frozen=True, slots=True)
class Process:
    """One that listens at a socket. `ended` is a pidfd: readable when the process has ended; the caller closes it."""

    pid: int
    ended: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A live one: `captures` processes have served its connection so far, and had `resent` requests sent again."""

    pid: int
    captures: int
    resent: int

    @property
    def restarts(self) -> int:
        """How often a capture process has followed another one."""
        return max(0, self.captures - 1)


def socket_of(paths: SetPaths) -> Path:
    """Where the set's holder listens."""
    return paths.run / SOCKET


def missing() -> str | None:
    """Why no holder can be used here; None when it can."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH} is off"
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < LEAST_KERNEL:
        return f"this kernel is Linux {release}; from 6.9 on it can hand over what a dead capture process had taken"
    return None


def find(paths: SetPaths) -> Holder | None:
    """The set's holder; None when none lives, or its connection has ended (it then ends by itself)."""
    with _door(socket_of(paths), socket.SOCK_SEQPACKET) as door:
        if door is None:
            return None
        try:
            hello, files, _, _ = socket.recv_fds(door, _HELLO.size, 2)
        except OSError:
            return None
        try:
            if len(files) != 2 or len(hello) != _HELLO.size or _HELLO.unpack(hello)[0] != _HELLO_MAGIC:
                return None
            look = select.poll()
            look.register(files[0], 0)
            if look.poll(0):
                return None
            with mmap.mmap(files[1], _NOTE_BYTES, prot=mmap.PROT_READ) as note:
                captures, resent = _COUNTS.unpack_from(note, _COUNTS_AT)
            return Holder(_peer(door), captures, resent)
        finally:
            for file in files:
                os.close(file)


def process_at(place: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> Process | None:
    """Who listens at a socket; None when nobody does."""
    with _door(place, kind) as door:
        if door is None:
            return None
        pid = _peer(door)
        try:
            return Process(pid, door.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        except OSError:  # it has ended since, or the kernel is older than 6.5
            with suppress(ProcessLookupError):
                return Process(pid, os.pidfd_open(pid))
            return None


def pid_at(place: Path) -> int | None:
    """The id of the process that listens at a stream socket; None when nobody does."""
    with _door(place, socket.SOCK_STREAM) as door:
        return None if door is None else _peer(door)


def lives_beside(control: Path) -> bool:
    """Whether a holder lives that belongs to a capture process with this control socket."""
    with _door(control.with_name(SOCKET), socket.SOCK_SEQPACKET) as door:
        return door is not None


def holder_process(paths: SetPaths) -> Process | None:
    """The set's holder as a process; None when none lives."""
    return process_at(socket_of(paths), socket.SOCK_SEQPACKET)


def end(paths: SetPaths, at_once: bool = True) -> None:
    """Have the holder end: killed, or (not `at_once`) by itself, since its connection has ended.

    With the capture process dead, too, the filesystem above sees I/O errors from here on. Raises PreconditionError when
    it does not end. Harmless when none lives.
    """
    found = holder_process(paths)
    if found is None:
        return
    try:
        if at_once:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(found.ended, signal.SIGKILL)
        if not select.select([found.ended], [], [], END_SECONDS)[0]:
            raise PreconditionError(
                f"the holder (pid {found.pid}) does not end", f"see /proc/{found.pid}/stack for what it waits"
            )
    finally:
        os.close(found.ended)


@contextmanager
def _door(place: Path, kind: socket.SocketKind) -> Iterator[socket.socket | None]:
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC) as door:
        door.settimeout(DOOR_SECONDS)
        try:
            _connect(door, place)
        except OSError:
            yield None
            return
        yield door


def _connect(door: socket.socket, place: Path) -> None:
    deadline = time.monotonic() + DOOR_SECONDS
    while True:
        try:
            return door.connect(os.fspath(place))
        except BlockingIOError:  # somebody listens, and has not come to those who asked before
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _peer(door: socket.socket) -> int:
    credentials = door.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[0])
