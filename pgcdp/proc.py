"""Child processes: run one with captured output, as another user where asked, and say well what went wrong.

Nothing here goes through a shell, and nothing inherits the caller's working directory: a program that runs as
`postgres` may be unable to enter it.
"""

from __future__ import annotations

import os
import pwd
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgcdp.errors import PgcdpError, PreconditionError

_QUOTED_LINES = 4
ADMIN_PLACES = ("/usr/sbin", "/sbin")


@dataclass(frozen=True, slots=True)
class User:
    """An operating system user that programs run as."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that has ended."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    seconds: float


class ProcessFailed(PgcdpError):
    """A program ended with an error; `completed` holds what it said."""

    kind = "process"

    def __init__(self, message: str, completed: Completed, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.completed = completed


def check_root() -> None:
    """Raises PreconditionError for anybody but root."""
    if os.geteuid() != 0:
        raise PreconditionError(f"pgcdp runs as user id {os.geteuid()}, but mounts need root", "run it with sudo")


def user_named(name: str) -> User:
    """The user `name`. Raises PreconditionError when the system does not know it."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise PreconditionError(
            f'no operating system user "{name}"', f"make it with: useradd --system {name}"
        ) from None
    return _user(entry)


def user_with_id(uid: int) -> User:
    """The user with number `uid`. Raises PreconditionError when the system does not know it."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise PreconditionError(
            f"no operating system user has the number {uid}", f"make one with: useradd --system --uid {uid} NAME"
        ) from None
    return _user(entry)


def owner_of(path: Path) -> User:
    """The user who owns `path`. Raises PreconditionError when there is no such file or user."""
    try:
        return user_with_id(os.stat(path).st_uid)
    except FileNotFoundError:
        raise PreconditionError(f"{path} does not exist") from None


def find_program(name: str) -> str | None:
    """Where a program is: in PATH, or where those of an administrator are, which are not in the PATH of cron."""
    path = os.pathsep.join([os.environ.get("PATH") or os.defpath, *ADMIN_PLACES])
    return shutil.which(name, path=path)


def run(
    argv: Sequence[str],
    *,
    user: User | None = None,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = Path("/"),
    timeout: float | None = None,
    check: bool = True,
    output: int | None = None,
    keep_fds: Sequence[int] = (),
) -> Completed:
    """Run a program to its end and capture what it prints (UTF-8, undecodable bytes kept as escapes).

    A program named without its place is looked for as `find_program` does. `env` replaces the environment; None passes
    on the caller's. `output`: the descriptor of a file that gets what it writes to stdout. `cwd` is entered with the
    caller's rights, before it becomes `user`. `keep_fds`: descriptors that it inherits. Raises ProcessFailed
    when it ends with another code
    than 0 (unless `check` is false) or does not end in `timeout` seconds (it is then killed), PreconditionError when
    the program is missing or may not be run.
    """
    started = time.monotonic()
    command = tuple(os.fspath(word) for word in argv)
    try:
        done = subprocess.run(
            command,
            executable=find_program(command[0]),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            stdout=subprocess.PIPE if output is None else output,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
            env=None if env is None else dict(env),
            cwd=cwd,
            timeout=timeout,
            check=False,
            pass_fds=tuple(keep_fds),
            **_identity(user),
        )
    except subprocess.TimeoutExpired as late:
        completed = Completed(command, -1, _text(late.stdout), _text(late.stderr), time.monotonic() - started)
        raise ProcessFailed(f"{_name(command)} did not end in {timeout:g} s and was killed", completed) from None
    except OSError as error:
        raise _cannot_run(command, user, error) from None
    completed = Completed(command, done.returncode, done.stdout or "", done.stderr, time.monotonic() - started)
    if check and done.returncode != 0:
        raise ProcessFailed(failure(completed), completed)
    return completed


def spawn(
    argv: Sequence[str],
    *,
    output: Path | None,
    user: User | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = Path("/"),
    keep_fds: Sequence[int] = (),
) -> int:
    """Start a daemon and give its process id. It has a session of its own and is no child of the caller.

    `output` is appended to with what it prints (None: nowhere); it is opened with the caller's rights and, when new,
    given to `user`. Raises PreconditionError when the program or the file cannot be opened.
    """
    command = tuple(os.fspath(word) for word in argv)
    if not os.access(command[0], os.X_OK):
        raise PreconditionError(f"{command[0]} is not a program that can be run")
    log = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC) if output is None else _open_log(output, user)
    # The shell says its process id and then becomes the program: no job control, no changed signals, no zombie.
    wrapper = ("setsid", "--fork", "/bin/sh", "-c", 'echo $$; exec "$@" >&2', "sh", *command)
    try:
        started = subprocess.run(
            wrapper,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=None if env is None else dict(env),
            cwd=cwd,
            check=False,
            pass_fds=tuple(keep_fds),
            text=True,
            **_identity(user),
        )
    except OSError as error:
        raise _cannot_run(command, user, error) from None
    finally:
        os.close(log)
    if not started.stdout.strip().isdigit():
        raise PreconditionError(f"{_name(command)} could not be started (exit code {started.returncode})")
    return int(started.stdout)


def failure(completed: Completed) -> str:
    """One line that says how a program failed, with the last lines that it wrote to stderr."""
    code = completed.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    lines = [line.strip() for line in (completed.stderr or completed.stdout).splitlines() if line.strip()]
    said = " | ".join(lines[-_QUOTED_LINES:])
    return f"{_name(completed.argv)} {how}: {said}" if said else f"{_name(completed.argv)} {how}"


def exists(pid: int) -> bool:
    """Whether a process with this id runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def end(pid: int, timeout: float = 10.0) -> None:
    """Kill a process and wait until it has ended; harmless when it has already."""
    with suppress(ProcessLookupError):
        ended = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            select.select([ended], [], [], timeout)
        finally:
            os.close(ended)


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot: with its id it names a process for ever."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _user(entry: pwd.struct_passwd) -> User:
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)))


def _identity(user: User | None) -> dict[str, Any]:
    """What subprocess needs to become `user`; nothing when that is who we are."""
    if user is None or (user.uid == os.geteuid() and user.gid == os.getegid()):
        return {}
    return {"user": user.uid, "group": user.gid, "extra_groups": user.groups}


def _open_log(path: Path, user: User | None) -> int:
    # A user who owns the directory could have put a link there, and would be given what that leads to.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            log = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise PreconditionError(f"cannot write the log {path}: {error.strerror}") from None
    if user is not None and os.geteuid() == 0:
        os.fchown(log, user.uid, user.gid)
    return log


def _cannot_run(command: Sequence[str], user: User | None, error: OSError) -> PreconditionError:
    as_user = f" as user {user.name}" if user else ""
    return PreconditionError(
        f"cannot run {command[0]}{as_user}: {error.strerror}", "check that it is installed and may be run by that user"
    )


def _name(command: Sequence[str]) -> str:
    return Path(command[0]).name


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="backslashreplace") if isinstance(output, bytes) else output or ""
