"""The engine's control socket: one JSON object a line, and one a line as its answer.

An error comes as `{"error":{"kind","message","hint"}}`.

A capture process may be replaced while it is asked (keeper.py). What a command asks then waits for the next one, and is
asked again where that does no harm:

    cut, sync, grow, begin records   again: done twice they are as done once
    mark, end records                again only if it cannot have reached the one that died: each is a write of its own
    stop                             not: nobody replaces one that is to end
    status                           only by `next_status`: else it tells, just so, that none serves
    heal, release                    not: the agent, which asks these, begins anew by itself
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgcdp.capture import holder
from pgcdp.capture.children import pidfd, reap
from pgcdp.errors import BugError, DamageError, PgcdpError, PreconditionError, TargetError, UsageError
from pgcdp.records import Position, Volume

_BY_KIND: dict[str, type[PgcdpError]] = {
    "usage": UsageError,
    "target": TargetError,
    "damage": DamageError,
    "precondition": PreconditionError,
    "busy": PreconditionError,
    "tracking": PreconditionError,
    "bug": BugError,
}
MARK_LIMIT = 1024
"""The longest name of a mark in bytes."""
SUCCESSOR_SECONDS = 60.0
"""How long a command waits for the capture process that follows one that died, as long as a holder lives."""


class EngineGone(PreconditionError):
    """No engine answers at the control socket."""


class AnswerLost(EngineGone):
    """The engine ended with the request in its hands: it was done, or it was not."""


class EngineBusy(PreconditionError):
    """The engine refuses to stop while a volume file is open."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """What changed while the journal could not grow: `blocks` of 4096 bytes, behind write `behind`, since `since_ns`.

    `healing`: they are brought into the journal now.
    """

    behind: int
    since_ns: int
    blocks: int
    healing: bool


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The engine's `status` reply. Writes are write numbers, sizes bytes; `raw` is the whole reply.

    `state` is "capturing", "tracking" or "stalled"; `tracked` tells of a gap that goes on.
    `position` is where the last durable batch ends.
    `open_volumes` names the volumes whose file is held open (by a loop device), `errors` what could not be written.
    """

    state: str
    pid: int
    last_write: int
    durable_write: int
    applied_write: int
    synced_write: int
    released_write: int
    batch: int
    position: Position
    journal_bytes: int
    journal_limit: int
    segments: int
    segment_bytes: int
    volumes: tuple[Volume, ...]
    open_volumes: tuple[str, ...]
    rss_kib: int
    errors: tuple[str, ...]
    tracked: Tracked | None
    raw: dict[str, Any]


class EngineClient:
    """Requests to the engine at `control`; each opens a connection of its own, so a client survives the engine."""

    def __init__(self, control: Path, timeout: float = 60.0) -> None:
        self.control = control
        self.timeout = timeout

    def request(self, command: str, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send one request and return its reply. Raises EngineGone, EngineBusy, or the error that the engine names."""
        patience = self.timeout if timeout is None else timeout
        line = json.dumps({"cmd": command, **arguments}).encode() + b"\n"
        asked = False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as door:
                door.settimeout(patience)
                door.connect(os.fspath(self.control))
                asked = True
                door.sendall(line)
                answer = _line_of(door)
        except TimeoutError:
            raise PreconditionError(
                f"the engine at {self.control} did not answer {command} in {patience:g} s",
                "look at its log and at the load of its disks",
            ) from None
        except OSError as error:
            if not asked:
                raise EngineGone(
                    f"no engine answers at {self.control}: {error.strerror or error}", "start it with pgcdp up"
                ) from None
            answer = b""
        if not answer.endswith(b"\n"):
            raise AnswerLost(
                f"the engine at {self.control} ended before it answered {command}", "start it with pgcdp up"
            )
        return _reply(command, answer)

    def _outlive(self, command: str, timeout: float | None = None, *, again: bool, **arguments: Any) -> dict[str, Any]:
        """`request`, which waits for the next capture process as long as a holder keeps the connection for that one.

        `again`: it is asked, too, what the one before has not answered. Raises EngineGone after SUCCESSOR_SECONDS.
        """
        deadline = None
        while True:
            try:
                return self.request(command, timeout, **arguments)
            except EngineGone as error:
                deadline = deadline or time.monotonic() + SUCCESSOR_SECONDS
                unsure = isinstance(error, AnswerLost) and not again
                if unsure or not holder.lives_beside(self.control) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def alive(self) -> bool:
        """Whether an engine answers."""
        try:
            self.request("status", timeout=10.0)
        except EngineGone:
            return False
        return True

    def status(self) -> EngineStatus:
        return parse_status(self.request("status"))

    def next_status(self) -> EngineStatus:
        """`status` for who goes on with whichever process serves: it waits for the one that follows one that died."""
        return parse_status(self._outlive("status", again=True))

    def cut(self) -> int:
        """Make everything that was answered durable. Returns the last durable write."""
        return int(self._outlive("cut", again=True)["durable_write"])

    def durable_write(self) -> int:
        """The last durable write."""
        return self.status().durable_write

    def mark(self, name: str) -> int:
        """Put a mark into the write order and return its write number.

        Raises UsageError for a name that is empty or longer than MARK_LIMIT, AnswerLost when it is not known whether
        the mark is there.
        """
        size = len(name.encode(errors="surrogateescape"))
        if not 1 <= size <= MARK_LIMIT:
            what = f"has {size} bytes, more than {MARK_LIMIT}" if size else "is empty"
            raise UsageError(f"the name of the mark {what}", "give it a name, such as pgcdp mark before-upgrade")
        try:
            return int(self._outlive("mark", again=False, name=name)["write"])
        except AnswerLost:
            raise AnswerLost(
                f'capture ended before it answered whether the mark "{name}" is set',
                "see with pgcdp info whether it is, and set it again if not",
            ) from None

    def rewind_record(self, what: Literal["begin", "end"], name: str) -> int:
        """Put the begin or end record of a rewind in place into the write order; returns its write number.

        Raises AnswerLost when it is not known whether an end record is there.
        """
        return self._record("rewind", what, name)

    def heal(self) -> None:
        """Have what is tracked brought into the journal. Raises PreconditionError while it has no room."""
        self.request("heal")

    def gap_record(self, what: Literal["begin", "end"], name: str) -> int:
        """Put the begin or end record of a gap into the write order; returns its write number. Raises as above."""
        return self._record("gap", what, name)

    def _record(self, of: str, what: str, name: str) -> int:
        """Of several begins in a row readers take one (store/rewinds.py, gaps.py); an end ends one begin."""
        arguments: dict[str, Any] = {"name": name, of: what}
        try:
            return int(self._outlive("mark", again=what == "begin", **arguments)["write"])
        except AnswerLost:
            raise AnswerLost(
                f"capture ended before it answered whether the {what} record of the {of} is set",
                "pgcdp up looks, and finishes it",
            ) from None

    def grow(self, volume: str, size: int) -> None:
        """Have a volume, by name, show so many bytes of its backing, which has become larger."""
        self._outlive("grow", again=True, volume=volume, bytes=size)

    def release(self, write: int) -> None:
        """The store holds all writes up to `write` durably: their segments may be used again."""
        self.request("release", write=write)

    def sync(self, timeout: float = 3600.0) -> int:
        """Bring all that is durable now to the volumes and sync them. Returns the write up to which that is so."""
        return int(self._outlive("sync", timeout, again=True)["applied_write"])

    def stop(self, timeout: float = 3600.0) -> None:
        """Apply all, sync, mark the journal clean, unmount, end; waits until the process has ended.

        Raises EngineBusy while a volume file is open, AnswerLost when it died before it had stopped. Harmless when no
        engine runs.
        """
        try:
            pid = int(self.request("status")["pid"])
        except EngineGone:
            return
        ended = pidfd(pid)
        try:
            try:
                self.request("stop", timeout=timeout)
            except AnswerLost:
                raise AnswerLost(
                    f"the engine (pid {pid}) died before it had stopped",
                    "run the command again: it brings to the volumes what the journal has, and stops",
                ) from None
            if ended is not None and not select.select([ended], [], [], timeout)[0]:
                raise PreconditionError(f"the engine (pid {pid}) did not end in {timeout:g} s", "look at its log")
        finally:
            if ended is not None:
                os.close(ended)
            reap()


def parse_status(reply: dict[str, Any]) -> EngineStatus:
    """EngineStatus of a `status` reply. Raises BugError when it lacks a key."""
    try:
        journal, position = reply["journal"], reply["position"]
        return EngineStatus(
            state=str(reply["state"]),
            pid=int(reply["pid"]),
            last_write=int(reply["last_write"]),
            durable_write=int(reply["durable_write"]),
            applied_write=int(reply["applied_write"]),
            synced_write=int(reply["synced_write"]),
            released_write=int(reply["released_write"]),
            batch=int(reply["batch"]),
            position=Position(int(position["segment"]), int(position["offset"])),
            journal_bytes=int(journal["bytes"]),
            journal_limit=int(journal["limit"]),
            segments=int(journal["segments"]),
            segment_bytes=int(journal["segment_bytes"]),
            volumes=tuple(Volume(int(row["number"]), str(row["name"]), int(row["bytes"])) for row in reply["volumes"]),
            open_volumes=tuple(str(row["name"]) for row in reply["volumes"] if row["open"]),
            rss_kib=int(reply["rss_kib"]),
            errors=tuple(str(error) for error in reply.get("errors", ())),
            tracked=_tracked(reply.get("tracked")),
            raw=reply,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BugError(f"the engine's status reply is not understood: {error!r}") from None


def _reply(command: str, answer: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(answer)
    except ValueError:
        raise BugError(f"the engine's answer to {command} is not JSON: {answer[:80]!r}") from None
    if not isinstance(reply, dict):
        raise BugError(f"the engine's answer to {command} is not an object: {answer[:80]!r}")
    error = reply.get("error")
    if error is None:
        return reply
    kind = EngineBusy if error.get("kind") == "busy" else _BY_KIND.get(str(error.get("kind")), PgcdpError)
    raise kind(str(error.get("message")), error.get("hint"))


def _line_of(door: socket.socket) -> bytes:
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        part = door.recv(65536)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def _tracked(told: dict[str, Any] | None) -> Tracked | None:
    if told is None:
        return None
    return Tracked(int(told["behind"]), int(told["since_ns"]), int(told["blocks"]), bool(told["healing"]))
