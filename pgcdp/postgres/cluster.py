"""Clusters: find the programs, look at a data directory, make one, start and stop it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp import proc
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres import control
from pgcdp.postgres.processes import Postmaster as Postmaster
from pgcdp.postgres.processes import find_postmaster as find_postmaster
from pgcdp.postgres.processes import find_processes as find_processes
from pgcdp.postgres.processes import kill_leftovers as kill_leftovers
from pgcdp.postgres.processes import title
from pgcdp.postgres.processes import wait_gone as wait_gone
from pgcdp.proc import User

OLDEST, NEWEST = 13, 18
_POLL = 0.02
VERSION_SECONDS = 60.0
"""How long a program may take to say its version."""
UNSAID_SECONDS = 5.0
"""How long a postmaster may take from its start to its postmaster.pid."""
FOLLOWED = re.compile(
    r"base|global|pg_(commit_ts|dynshmem|logical|multixact|notify|replslot|serial|snapshots|stat|stat_tmp|subtrans|tblspc"
    r"|twophase|wal|xact)|PG_VERSION"
)
"""Names in a data directory that Postgres follows when they are links; one elsewhere (log, postgresql.conf) is its
owner's business."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of one PostgreSQL installation."""

    directory: Path
    major: int

    def path(self, name: str) -> Path:
        """The program `name`. Raises PreconditionError when this installation lacks it."""
        program = self.directory / name
        if not program.is_file():
            raise PreconditionError(
                f"{name} of PostgreSQL {self.major} is missing in {self.directory}",
                f"install it with: apt-get install postgresql-{self.major}",
            )
        return program


@dataclass(frozen=True, slots=True)
class DataDirectory:
    """What a data directory says about itself, read without starting it.

    `wal_link` and `tablespaces` (by OID) are where data lies outside of it; `postmaster` is the one running on it.
    """

    path: Path
    major: int
    user: User
    control: control.Control
    postmaster: Postmaster | None
    wal_link: Path | None
    tablespaces: Mapping[int, Path]

    @property
    def system_identifier(self) -> int:
        """The 64-bit number that initdb gave the cluster."""
        return self.control.system_identifier

    @property
    def checksums(self) -> bool:
        """Whether data pages carry checksums."""
        return self.control.checksums

    @property
    def outside(self) -> tuple[Path, ...]:
        """Places outside of the directory that hold a part of the cluster."""
        return (*(() if self.wal_link is None else (self.wal_link,)), *self.tablespaces.values())


def find_binaries(major: int, prefer: Path | None = None, user: User | None = None) -> Binaries:
    """The programs of version `major`: in `prefer`, PGCDP_PG_BINDIRS (a colon list), or where packages put them.

    To know their version they are run, as `user`: where `prefer` comes from somebody else, as the command line of a
    postmaster does, it must be him. Raises PreconditionError when there are none, naming the places where they were
    looked for.
    """
    if not OLDEST <= major <= NEWEST:
        raise PreconditionError(
            f"PostgreSQL {major} is not supported", f"pgcdp works with PostgreSQL {OLDEST} to {NEWEST}"
        )
    listed = [Path(word) for word in os.environ.get("PGCDP_PG_BINDIRS", "").split(":") if word]
    packaged = [Path(f"/usr/lib/postgresql/{major}/bin"), Path(f"/usr/pgsql-{major}/bin"), Path("/usr/local/pgsql/bin")]
    places = [*([prefer] if prefer else []), *listed, *packaged]
    for place in places:
        if version_of(place, user) == major:
            return Binaries(place, major)
    raise PreconditionError(
        f"no programs of PostgreSQL {major} in {', '.join(map(str, places))}",
        f"install postgresql-{major}, or name their directory in PGCDP_PG_BINDIRS",
    )


def version_of(bindir: Path, user: User | None) -> int | None:
    """The major version of the programs in `bindir`; None when there is no `postgres` that `user` can run."""
    program = bindir / "postgres"
    if not os.access(program, os.X_OK):
        return None
    try:
        told = proc.run([str(program), "--version"], user=user, check=False, timeout=VERSION_SECONDS).stdout
    except PgcdpError:
        return None
    match = re.search(r"\(PostgreSQL\) (\d+)", told)
    return int(match[1]) if match else None


def ask_setting(argv: Sequence[str], name: str, user: User) -> str:
    """What `postgres -C` says of a cluster that does not run, by its command line. Raises PreconditionError."""
    words = [*argv, "-C", name]
    try:
        return proc.run(words, user=user, env=environment()).stdout.rstrip("\n")
    except proc.ProcessFailed as failed:
        raise PreconditionError(
            f"the configuration of the cluster cannot be read: {failed.message}",
            f"as {user.name}, {shlex.join(words)} says what is wrong with it; correct that, or start the cluster as "
            "you always do",
        ) from None


def inspect(pgdata: Path) -> DataDirectory:
    """Look at a data directory. Raises PreconditionError when it is none, DamageError when pg_control is not whole."""
    path = pgdata.absolute()
    if not path.is_dir():
        raise PreconditionError(f"no directory {path}", "name the data directory of a cluster (SHOW data_directory)")
    try:
        major = int((path / "PG_VERSION").read_text().strip())
        head = _read_head(path / "global" / "pg_control")
    except (OSError, ValueError):
        raise PreconditionError(
            f"{path} is not a data directory of PostgreSQL", "name the directory that holds PG_VERSION"
        ) from None
    return DataDirectory(
        path=path,
        major=major,
        user=proc.owner_of(path),
        control=control.parse_checked(head, str(path / "global" / "pg_control")),
        postmaster=find_postmaster(path),
        wal_link=wal_link(path),
        tablespaces=tablespace_links(path),
    )


def read_control(pgdata: Path) -> control.Control:
    """pg_control of a data directory. Raises DamageError when its checksum is wrong, PreconditionError if missing."""
    path = pgdata / "global" / "pg_control"
    try:
        return control.parse_checked(_read_head(path), str(path))
    except OSError as error:
        raise PreconditionError(f"cannot read {path}: {error.strerror}") from None


def wal_link(pgdata: Path) -> Path | None:
    """Where pg_wal lies when it is a link."""
    return _link_target(pgdata / "pg_wal")


def tablespace_links(pgdata: Path) -> dict[int, Path]:
    """Where the tablespaces that lie outside the data directory are, by OID."""
    links = {}
    with suppress(FileNotFoundError):
        for entry in (pgdata / "pg_tblspc").iterdir():
            target = _link_target(entry)
            if entry.name.isdigit() and target is not None:
                links[int(entry.name)] = target
    return links


def initdb(binaries: Binaries, pgdata: Path, user: User, *options: str) -> None:
    """Make a cluster at `pgdata` as `user`; its parent must exist. Raises ProcessFailed with initdb's own words."""
    proc.run(
        [str(binaries.path("initdb")), "-D", str(pgdata), "--username=postgres", *options],
        user=user,
        env=environment(),
        timeout=600,
    )


def environment() -> dict[str, str]:
    """The caller's environment without libpq's and Postgres's own variables, which would change what runs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG") or name.startswith("PGCDP_")}


def stop(pgdata: Path, timeout: float = 60.0) -> bool:
    """Stop the cluster (fast: sessions are ended, all is checkpointed). False when none was running.

    Raises PreconditionError, and leaves it running, when it has not stopped after `timeout` seconds; the message
    names what it waits for. Raises it too when the postmaster ended without a clean shutdown.
    """
    postmaster = find_postmaster(pgdata)
    if postmaster is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(postmaster.pid, signal.SIGINT)
    if not wait_gone(postmaster, timeout):
        waits = sorted({title(pid) for pid in find_processes(pgdata) if pid != postmaster.pid})
        raise PreconditionError(
            f"the cluster at {pgdata} did not stop in {timeout:g} s (postmaster {postmaster.pid}, "
            f"waiting for: {', '.join(waits) or 'nothing that shows'})",
            "see its log, end what holds it, and try again",
        )
    state = read_control(pgdata).state
    if state not in (control.State.SHUT_DOWN, control.State.SHUT_DOWN_IN_RECOVERY):
        raise PreconditionError(
            f"the cluster at {pgdata} ended without a clean shutdown", "see its log, start it and stop it again"
        )
    return True


def command_line(binaries: Binaries, pgdata: Path, *options: str) -> tuple[str, ...]:
    """The plain command line of a cluster: `postgres -D PGDATA OPTIONS`."""
    return (str(binaries.path("postgres")), "-D", str(pgdata), *options)


def start(
    argv: Sequence[str], pgdata: Path, user: User, log_file: Path | None = None, timeout: float = 300.0
) -> Postmaster:
    """Run a postmaster in the background as `user` and wait until it takes connections.

    `argv` is its whole command line (`Postmaster.argv` of an earlier run, or `command_line`). Its output is appended
    to `log_file`. Raises PreconditionError when one runs already, when it ends (with its last words), or when it is
    not ready after `timeout` seconds; it is then left running, since its recovery may only be long.
    """
    if (running := find_postmaster(pgdata)) is not None:
        raise PreconditionError(
            f"a postmaster ({running.pid}) runs on {pgdata} already", f"stop it with: kill -INT {running.pid}"
        )
    begin = log_file.stat().st_size if log_file is not None and log_file.exists() else 0
    pid = proc.spawn(argv, output=log_file, user=user, env=environment())
    return wait_ready(pgdata, pid, log_file, begin, timeout)


def find_started(pgdata: Path) -> Postmaster | None:
    """The postmaster of a data directory; one that a killed command has just started is given time to say so.

    It is a process without postmaster.pid until then, and a second one would be refused by its socket.
    """
    deadline = time.monotonic() + UNSAID_SECONDS
    while True:
        running = find_postmaster(pgdata)
        if running is not None or not find_processes(pgdata) or time.monotonic() > deadline:
            return running
        time.sleep(_POLL)


def wait_ready(pgdata: Path, pid: int, log_file: Path | None, log_begin: int = 0, timeout: float = 300.0) -> Postmaster:
    """Wait until process `pid` is a postmaster that takes connections (of a standby: read-only ones).

    Raises PreconditionError when it ends, quoting its log from byte `log_begin` on, or when the time is over.
    """
    started = proc.start_time(pid)
    deadline = time.monotonic() + timeout
    while True:
        if proc.start_time(pid) != started or not proc.exists(pid):
            raise PreconditionError(
                f"postgres did not start on {pgdata}: {last_words(log_file, log_begin)}",
                f"see {log_file}" if log_file else "see the cluster's log",
            )
        found = find_postmaster(pgdata)
        if found is not None and found.pid == pid and found.state in ("ready", "standby"):
            return found
        if time.monotonic() > deadline:
            raise PreconditionError(
                f"postgres on {pgdata} is not ready after {timeout:g} s (process {pid} runs on): "
                f"{last_words(log_file, log_begin)}",
                f"see {log_file}" if log_file else "see the cluster's log",
            )
        time.sleep(_POLL)


def last_words(log_file: Path | None, begin: int = 0, lines: int = 4) -> str:
    """The last lines of a log behind byte `begin`, those that tell of an error first, joined by ` | `."""
    try:
        if log_file is None:
            return "its output went nowhere"
        with log_file.open("rb") as file:
            file.seek(max(begin, log_file.stat().st_size - 65536))
            said = [line.strip() for line in file.read().decode(errors="backslashreplace").splitlines() if line.strip()]
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    telling = re.compile(r"\b(FATAL|PANIC|ERROR|HINT|DETAIL):|\b(syntax error|could not|cannot)\b")
    bad = [line for line in said if telling.search(line)]
    return " | ".join((bad or said)[-lines:]) or "it said nothing"


def can_enter(user: User, directory: Path) -> bool:
    """Whether `user` may enter `directory` and all above it."""
    return proc.run(["test", "-x", str(directory)], user=user, check=False).returncode == 0


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _link_target(path: Path) -> Path | None:
    """The absolute target of a symbolic link; None when `path` is none."""
    if not path.is_symlink():
        return None
    return Path(os.path.normpath(path.parent / os.readlink(path)))
