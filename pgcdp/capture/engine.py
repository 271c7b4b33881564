"""Run the C engine and talk to it: the only place that spawns it.

The control socket takes one JSON object a line and answers one a line; an error comes as
`{"error":{"kind","message","hint"}}`. Exit codes of the engine are those of `pgcdp.errors`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pgcdp import proc
from pgcdp.capture import holder as keeping
from pgcdp.capture import volumes
from pgcdp.config import Config
from pgcdp.errors import BugError, DamageError, PgcdpError, PreconditionError, TargetError, UsageError
from pgcdp.records import Position, Volume
from pgcdp.sets import SetPaths

_BY_EXIT_CODE: dict[int, type[PgcdpError]] = {2: UsageError, 3: TargetError, 5: DamageError, 6: PreconditionError}
_BY_KIND: dict[str, type[PgcdpError]] = {
    "usage": UsageError,
    "target": TargetError,
    "damage": DamageError,
    "precondition": PreconditionError,
    "busy": PreconditionError,
    "bug": BugError,
}


MARK_LIMIT = 1024
"""The longest name of a mark in bytes."""


class EngineGone(PreconditionError):
    """No engine answers at the control socket."""


class EngineBusy(PreconditionError):
    """The engine refuses to stop while a volume file is open."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The engine's `status` reply. Writes are write numbers, sizes bytes; `raw` is the whole reply.

    `state` is "capturing" or "stalled"; `position` is where the last durable batch ends.
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
        ended = _pidfd(pid)
        try:
            self.request("stop", timeout=timeout)
            if ended is not None and not select.select([ended], [], [], timeout)[0]:
                raise PreconditionError(f"the engine (pid {pid}) did not end in {timeout:g} s", "look at its log")
        finally:
            if ended is not None:
                os.close(ended)
            reap()


_NO_FILES: Mapping[int, int] = MappingProxyType({})


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
            raw=reply,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BugError(f"the engine's status reply is not understood: {error!r}") from None


def find_engine() -> Path:
    """The engine's program: `PGCDP_ENGINE`, else the one inside the package. Raises PreconditionError."""
    given = os.environ.get("PGCDP_ENGINE")
    program = Path(given) if given else Path(__file__).resolve().parent.parent / "_bin" / "pgcdp-engine"
    if not os.access(program, os.X_OK) or program.is_dir():
        raise PreconditionError(f"no engine at {program}", "install pgcdp with its engine, or set PGCDP_ENGINE to it")
    return program


def capture_command(config: Config, create: bool, put_back: bool = False, holder: Path | None = None) -> list[str]:
    """The command line that captures the volumes of a set, numbered in their order; `holder`: its holder's socket."""
    paths = config.paths
    return [
        os.fspath(find_engine()), "capture",
        "--set-id", config.set_id,
        "--journal", os.fspath(config.journal),
        *(["--create"] if create else []),
        *(["--put-back"] if put_back else []),
        "--segment-bytes", str(config.segment_size),
        "--journal-limit", str(config.journal_limit),
        "--fuse", os.fspath(paths.fuse),
        "--control", os.fspath(paths.control),
        *(["--holder", os.fspath(holder)] if holder is not None else []),
        *(f"{volume.name}:{volume.bytes}={volume.backing}" for volume in config.volumes),
    ]  # fmt: skip


def spawn_capture(
    config: Config, create: bool = False, timeout: float = 3600.0, *, put_back: bool = False, holder: Path | None = None
) -> EngineClient:
    """Start capture in a session of its own and wait until it answers (after it replayed the journal).

    With `put_back` the journal may hold writes to one volume behind the set's last, which is given up. `holder` is the
    socket of the set's holder, which has mounted. Its output goes to the set's engine log, 0600. Raises what the engine
    died of, by its exit code.
    """
    paths = config.paths
    for directory in (paths.state, paths.run, *([config.journal] if create else [])):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if holder is None:  # else it is mounted, and to look at it is to wait for who serves it
        paths.fuse.mkdir(mode=0o700, exist_ok=True)
    command = capture_command(config, create, put_back, holder)
    return _start(command, paths.control, paths.engine_log, timeout)[0]


def spawn_holder(paths: SetPaths, at: Path, adopt: EngineStatus | None = None, timeout: float = 60.0) -> None:
    """Start a holder in a session of its own that listens `at`, and wait until it does: it has mounted then.

    `adopt`: the status of a capture process whose holder is gone; the new one takes the connection from it instead.
    Raises what it died of, by its exit code.
    """
    for directory in (paths.state, paths.run):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [os.fspath(find_engine()), "hold", "--socket", os.fspath(at)]
    if adopt is None:
        paths.fuse.mkdir(mode=0o700, exist_ok=True)
        command += ["--fuse", os.fspath(paths.fuse)]
    else:
        held = adopt.raw["held"]
        command += ["--of", str(adopt.pid), "--fuse-fd", str(held["fuse_fd"]), "--note-fd", str(held["note_fd"])]
    at.unlink(missing_ok=True)
    with _log_of(paths.engine_log) as log:
        begin = os.fstat(log).st_size
        pid = _spawn(command, log, _NO_FILES)
        _await(lambda: keeping.find(paths) is not None, pid, paths.engine_log, begin, timeout)


def hand_over(client: EngineClient, ended: int, timeout: float) -> None:
    """Have a capture process end for its successor, with its journal clean; killed after `timeout` seconds.

    `ended` is its pidfd. Raises PreconditionError when it has no holder.
    """
    with suppress(EngineGone):  # it may end before its answer is read
        client.request("hand_over", timeout=timeout)
    if not select.select([ended], [], [], timeout)[0]:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, signal.SIGKILL)
        select.select([ended], [], [], timeout)
    reap()


def kill(pid: int, ended: int, timeout: float = 60.0) -> None:
    """SIGKILL by a pidfd, which is closed, and await the end. Raises PreconditionError when it does not end."""
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(ended, signal.SIGKILL)
        if not select.select([ended], [], [], timeout)[0]:
            raise PreconditionError(
                f"process {pid} does not end after SIGKILL", f"see /proc/{pid}/stack for what it waits"
            )
    finally:
        os.close(ended)
        reap()


def _start(
    command: Sequence[str], control: Path, log_file: Path, timeout: float, files: Mapping[int, int] = _NO_FILES
) -> tuple[EngineClient, int]:
    """Start an engine that serves and wait until it answers at `control`; gives its process id, too."""
    control.unlink(missing_ok=True)
    with _log_of(log_file) as log:
        begin = os.fstat(log).st_size
        pid = _spawn(command, log, files)
    client = EngineClient(control)
    try:
        _await(client.alive, pid, log_file, begin, timeout)
    except BaseException as error:
        if not isinstance(error, Exception):  # interrupted: nobody could find it before it answers
            _end(pid)
        raise
    return client, pid


def _spawn(command: Sequence[str], log: int, files: Mapping[int, int]) -> int:
    """The process id of a child in a session of its own, whose directory is / and whose output goes to `log`.

    `files` are further descriptors: {its number there: the one here}; standard input is empty unless named there.
    """
    passed = {**files, 1: log, 2: log}
    # Copied to where nothing is first: any of them may have the number that another one gets.
    free = max(*passed.keys(), *passed.values()) + 1
    copies = dict(enumerate(passed, free))
    steps: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        *((os.POSIX_SPAWN_DUP2, passed[there], copy) for copy, there in copies.items()),
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        *((os.POSIX_SPAWN_DUP2, copy, there) for copy, there in copies.items()),
        *((os.POSIX_SPAWN_CLOSE, copy) for copy in copies),
    ]
    shell = ["/bin/sh", "-c", 'cd / && exec "$@"', "sh", *command]
    pid = os.posix_spawn(shell[0], shell, os.environ, file_actions=steps, setsid=True)
    _children.add(pid)
    return pid


@contextmanager
def serving_view(place: Path, map_file: Path, held: int, cache: int | None = None) -> Iterator[EngineClient]:
    """As `start_view`, inside; it ends with this process, however that ends."""
    theirs, ours = os.pipe2(os.O_CLOEXEC)
    try:
        client, pid = start_view(place, map_file, held, cache, until=theirs)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    try:
        yield client
    finally:
        os.close(ours)  # it ends by that
        _await_end(pid)
        volumes.unmount_lazily(place / "fuse")


def start_view(
    place: Path, map_file: Path, held: int, cache: int | None = None, *, until: int = -1
) -> tuple[EngineClient, int]:
    """Serve a view of `map_file`: `place`/fuse/NAME is each volume. All else that it needs lies in `place`, too.

    `held` is a descriptor that the engine keeps open as long as it lives (-1: none). It outlives this process, unless
    `until` is given: then it ends when that descriptor does. Returns its process id, too; `end_views` ends it. Raises
    what it died of, by its exit code.
    """
    fuse = place / "fuse"
    fuse.mkdir(mode=0o700)
    command = [
        os.fspath(find_engine()), "view",
        *(["--until-eof"] if until >= 0 else []),
        "--map", os.fspath(map_file),
        "--fuse", os.fspath(fuse),
        "--control", os.fspath(place / "control"),
        "--overlay", os.fspath(place),
        *(["--cache", str(cache)] if cache is not None else []),
    ]  # fmt: skip
    files = {**({0: until} if until >= 0 else {}), **({_HELD: held} if held >= 0 else {})}
    try:
        return _start(command, place / "control", place / "engine.log", 600.0, files)
    except BaseException:
        volumes.unmount_lazily(fuse)
        raise


_HELD = 100
"""Number that a descriptor to keep has in the engine: above those that the shell could use."""


def end_views(place: Path, timeout: float = 60.0) -> None:
    """End the engines that have `place` or a file below it open: what a killed process left or does not end by itself.

    Waits for the end of each, at most `timeout` seconds.
    """
    name = find_engine().name
    for pid, found in volumes.users_of(place):
        ended = _pidfd(pid) if found == name else None
        if ended is None:
            continue
        try:
            if volumes.uses(pid, place):  # still: by now the number could be another process's
                signal.pidfd_send_signal(ended, signal.SIGKILL)
                select.select([ended], [], [], timeout)
        except ProcessLookupError:
            pass
        finally:
            os.close(ended)


def run_engine(arguments: Sequence[str], timeout: float | None = None) -> str:
    """Run another sub-command (`check`, `dump`) to its end and return what it prints. Raises by its exit code.

    Raises ProcessFailed when it did not end in `timeout` seconds.
    """
    done = proc.run([os.fspath(find_engine()), *arguments], check=False, timeout=timeout)
    if done.returncode:
        raise _died(done.returncode, done.stderr, None)
    return done.stdout


_children: set[int] = set()
"""Engines that this process started: their ends are collected, so that no zombie stays while this process lives."""


def _end(pid: int) -> None:
    if pid in _children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _children.discard(pid)


def _await_end(pid: int, timeout: float = 60.0) -> None:
    """Until a child has ended, which is killed when it does not."""
    deadline = time.monotonic() + timeout
    while pid in _children and time.monotonic() < deadline:
        reap()
        if pid in _children:
            time.sleep(0.005)
    _end(pid)


def reap() -> None:
    """Collect the engines that this process started and that have ended, so that none stays a zombie."""
    for pid in list(_children):
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0]
        except ChildProcessError:  # somebody else has collected it
            ended = pid
        if ended:
            _children.discard(pid)


def _await(answers: Callable[[], bool], pid: int, log: Path, begin: int, timeout: float) -> None:
    """Until a child answers. Raises what it died of, by its exit code and what it wrote to the log behind `begin`."""
    deadline = time.monotonic() + timeout
    while not answers():
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # another thread has collected it
            ended, status = pid, 1 << 8
        if ended:
            _children.discard(pid)
            with log.open("rb") as text:
                text.seek(begin)
                raise _died(os.waitstatus_to_exitcode(status), text.read().decode("utf-8", "replace"), log)
        if time.monotonic() > deadline:
            raise PreconditionError(f"the engine (pid {pid}) did not answer in {timeout:g} s", f"look at {log}")
        time.sleep(0.005)


@contextmanager
def _log_of(file: Path) -> Iterator[int]:
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield log
    finally:
        os.close(log)


def _died(code: int, text: str, log: Path | None) -> PgcdpError:
    """The error that an engine's exit code and last lines make."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    hint = next((line[5:].strip() for line in reversed(lines) if line.lower().startswith("hint:")), None)
    said = next((line for line in reversed(lines) if not line.lower().startswith("hint:")), "")
    for prefix in ("pgcdp-engine:", "error:"):
        said = said.removeprefix(prefix).strip()
    if code < 0:
        said = f"the engine was killed by signal {-code}" + (f" after: {said}" if said else "")
    elif not said:
        said = f"the engine ended with exit code {code} and said nothing"
    kind = _BY_EXIT_CODE.get(code, PgcdpError)
    return kind(said, hint or (f"look at {log}" if log else None))


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


def _pidfd(pid: int) -> int | None:
    """A descriptor that is readable when the process has ended; None when it has already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
