"""Run the C engine: the only place that spawns it. What is asked of one that runs, is in `capture.control`.

Exit codes of the engine are those of `pgcdp.errors`.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from pgcdp import proc
from pgcdp.capture import holder as keeping
from pgcdp.capture import volumes
from pgcdp.capture.children import await_end, end, exit_code, pidfd, reap, spawn
from pgcdp.capture.control import EngineClient, EngineGone, EngineStatus
from pgcdp.config import Config
from pgcdp.errors import DamageError, PgcdpError, PreconditionError, TargetError, UsageError
from pgcdp.sets import SetPaths

_BY_EXIT_CODE: dict[int, type[PgcdpError]] = {2: UsageError, 3: TargetError, 5: DamageError, 6: PreconditionError}
_NO_FILES: Mapping[int, int] = MappingProxyType({})
_HELD, _KEY = 100, 101
"""Numbers that a descriptor to keep, and the one with a key, have in the engine: above those the shell could use."""


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
        *(["--on-full", config.on_full] if config.on_full != "stall" else []),
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
        pid = spawn(command, log, _NO_FILES)
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


def _start(
    command: Sequence[str], control: Path, log_file: Path, timeout: float, files: Mapping[int, int] = _NO_FILES
) -> tuple[EngineClient, int]:
    """Start an engine that serves and wait until it answers at `control`; gives its process id, too."""
    with _log_of(log_file) as log:
        begin = os.fstat(log).st_size
        pid = spawn(command, log, files)
    client = EngineClient(control)
    try:
        _await(client.alive, pid, log_file, begin, timeout)
    except BaseException as error:
        if not isinstance(error, Exception):  # interrupted: nobody could find it before it answers
            end(pid)
        raise
    return client, pid


@contextmanager
def _piped(secret: bytes | None) -> Iterator[int]:
    """A descriptor from which a key is read; -1 of none. No argument and no environment has it, and no file."""
    if secret is None:
        yield -1
        return
    theirs, ours = os.pipe2(os.O_CLOEXEC)
    try:
        with open(ours, "wb") as pipe:  # a pipe takes so few bytes at once
            pipe.write(secret)
        yield theirs
    finally:
        os.close(theirs)


@contextmanager
def serving_view(
    place: Path, map_file: Path, held: int, cache: int | None = None, key: bytes | None = None
) -> Iterator[EngineClient]:
    """As `start_view`, inside; it ends with this process, however that ends."""
    theirs, ours = os.pipe2(os.O_CLOEXEC)
    try:
        client, pid = start_view(place, map_file, held, cache, until=theirs, key=key)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    try:
        yield client
    finally:
        os.close(ours)  # it ends by that
        await_end(pid)
        volumes.unmount_lazily(place / "fuse")


def start_view(
    place: Path,
    map_file: Path,
    held: int,
    cache: int | None = None,
    *,
    until: int = -1,
    key: bytes | None = None,
) -> tuple[EngineClient, int]:
    """Serve a view of `map_file`: `place`/fuse/NAME is each volume. All else that it needs lies in `place`, too.

    `held` is a descriptor that the engine keeps open as long as it lives (-1: none). It outlives this process, unless
    `until` is given: then it ends when that descriptor does. Returns its process id, too; `end_views` ends it. Raises
    what it died of, by its exit code. `key`: the store's data key, where that is encrypted.
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
        *(["--key-fd", str(_KEY)] if key is not None else []),
    ]  # fmt: skip
    files = {**({0: until} if until >= 0 else {}), **({_HELD: held} if held >= 0 else {})}
    try:
        with _piped(key) as secret:
            more = {_KEY: secret} if secret >= 0 else {}
            return _start(command, place / "control", place / "engine.log", 600.0, {**files, **more})
    except BaseException:
        volumes.unmount_lazily(fuse)
        raise


def end_views(place: Path, timeout: float = 60.0) -> None:
    """End the engines that have `place` or a file below it open: what a killed process left or does not end by itself.

    Waits for the end of each, at most `timeout` seconds.
    """
    name = find_engine().name
    for pid, found in volumes.users_of(place):
        ended = pidfd(pid) if found == name else None
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


def run_engine(
    arguments: Sequence[str], timeout: float | None = None, *, key: bytes | None = None, keep_fds: Sequence[int] = ()
) -> str:
    """Run another sub-command (`check`, `dump`) to its end and return what it prints. Raises by its exit code.

    `key`: the data key of the encrypted store that it reads; `keep_fds`: descriptors that it inherits. Raises
    ProcessFailed when it did not end in `timeout` seconds.
    """
    with _piped(key) as secret:
        words = ["--key-fd", str(secret)] if secret >= 0 else []
        kept = [*keep_fds, *([secret] if secret >= 0 else [])]
        command = [os.fspath(find_engine()), *arguments[:1], *words, *arguments[1:]]
        done = proc.run(command, check=False, timeout=timeout, keep_fds=kept)
    if done.returncode:
        raise _died(done.returncode, done.stderr, None)
    return done.stdout


def _await(answers: Callable[[], bool], pid: int, log: Path, begin: int, timeout: float) -> None:
    """Until a child answers. Raises what it died of, by its exit code and what it wrote to the log behind `begin`."""
    deadline = time.monotonic() + timeout
    while not answers():
        code = exit_code(pid)
        if code is not None:
            with log.open("rb") as text:
                text.seek(begin)
                raise _died(code, text.read().decode("utf-8", "replace"), log)
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
