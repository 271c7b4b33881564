"""The engine's control socket: one JSON object a line, and one a line as its answer.

An error comes as `{"error":{"kind","message","hint"}}`.
"""

from __future__ import annotations

import json
import os
import select
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


class EngineGone(PreconditionError):
    """No engine answers at the control socket."""


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
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as door:
                door.settimeout(patience)
                door.connect(os.fspath(self.control))
                door.sendall(line)
                answer = _line_of(door)
        except TimeoutError:
            raise PreconditionError(
                f"the engine at {self.control} did not answer {command} in {patience:g} s",
                "look at its log and at the load of its disks",
            ) from None
        except OSError as error:
            raise EngineGone(
                f"no engine answers at {self.control}: {error.strerror or error}", "start it with pgcdp up"
            ) from None
        if not answer:
            raise EngineGone(
                f"the engine at {self.control} closed the connection without an answer", "start it with pgcdp up"
            )
        return _reply(command, answer)

    def alive(self) -> bool:
        """Whether an engine answers."""
        try:
            self.request("status", timeout=10.0)
        except EngineGone:
            return False
        return True

    def status(self) -> EngineStatus:
        return parse_status(self.request("status"))

    def cut(self) -> int:
        """Make everything that was answered durable. Returns the last durable write."""
        return int(self.request("cut")["durable_write"])

    def durable_write(self) -> int:
        """The last durable write."""
        return self.status().durable_write

    def mark(self, name: str) -> int:
        """Put a mark into the write order and return its write number.

        Raises UsageError for a name that is empty or longer than MARK_LIMIT.
        """
        size = len(name.encode(errors="surrogateescape"))
        if not 1 <= size <= MARK_LIMIT:
            what = f"has {size} bytes, more than {MARK_LIMIT}" if size else "is empty"
            raise UsageError(f"the name of the mark {what}", "give it a name, such as pgcdp mark before-upgrade")
        return int(self.request("mark", name=name)["write"])

    def rewind_record(self, what: Literal["begin", "end"], name: str) -> int:
        """Put the begin or end record of a rewind in place into the write order; returns its write number."""
        return int(self.request("mark", name=name, rewind=what)["write"])

    def heal(self) -> None:
        """Have what is tracked brought into the journal. Raises PreconditionError while it has no room."""
        self.request("heal")

    def gap_record(self, what: Literal["begin", "end"], name: str) -> int:
        """Put the begin or end record of a gap into the write order; returns its write number."""
        return int(self.request("mark", name=name, gap=what)["write"])

    def grow(self, volume: str, size: int) -> None:
        """Have a volume, by name, show so many bytes of its backing, which has become larger."""
        self.request("grow", volume=volume, bytes=size)

    def release(self, write: int) -> None:
        """The store holds all writes up to `write` durably: their segments may be used again."""
        self.request("release", write=write)

    def sync(self, timeout: float = 3600.0) -> int:
        """Bring all that is durable now to the volumes and sync them. Returns the write up to which that is so."""
        return int(self.request("sync", timeout=timeout)["applied_write"])

    def stop(self, timeout: float = 3600.0) -> None:
        """Apply all, sync, mark the journal clean, unmount, end; waits until the process has ended.

        Raises EngineBusy while a volume file is open. Harmless when no engine runs.
        """
        try:
            pid = int(self.request("status")["pid"])
        except EngineGone:
            return
        ended = pidfd(pid)
        try:
            self.request("stop", timeout=timeout)
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
