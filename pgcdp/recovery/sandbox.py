"""An isolated Postgres on a restored data directory (design, truth 11).

It touches nothing outside of its data directory, its mounts and its own scratch directory, reads no configuration
from the image or from /etc, and can be reached only through a socket in a directory of its owner's.
Three walls, each enough against another danger:

1. a configuration of its own (`sandbox_settings`): lines that were appended without fsync are NUL bytes in a crash
   image, and a Debian-style configuration names production's own directory;
2. links out of the data directory (pg_wal, tablespaces) are led to its own mounts, or it is refused;
3. namespaces (`isolate`): whatever the WAL or the data still name outside cannot be written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from pgcdp import proc
from pgcdp.errors import PreconditionError, VerificationFailed
from pgcdp.postgres import cluster, session
from pgcdp.postgres.cluster import Binaries
from pgcdp.postgres.control import Control
from pgcdp.proc import User
from pgcdp.recovery import sandbox_settings
from pgcdp.recovery.links import own_places
from pgcdp.recovery.wal_room import give_wal_room
from pgcdp.units import parse_lsn

PORT = 5432
"""Its socket lies in a directory of its own, so all sandboxes can have the same port."""

_LEFTOVERS = (
    "postmaster.pid",
    "postmaster.opts",
    "standby.signal",
    "recovery.signal",
    "backup_label",
    "tablespace_map",
    "promote",
)
_LONGEST_SOCKET = 107 - len(f"/.s.PGSQL.{PORT}.lock")

_GONE = re.compile(r'could not (?:open|stat file or) directory "([^"]+)": No such file or directory')
_LEFT_BEHIND = re.compile(r'some useless files may be left behind in old database directory "([^"]+)"')


@dataclass(frozen=True, slots=True)
class Recovery:
    """What crash recovery did: `from_lsn` and `to_lsn` are None when Postgres found that none was needed."""

    seconds: float
    from_lsn: int | None
    to_lsn: int | None
    warnings: tuple[str, ...]
    defaults: tuple[str, ...] = ()
    """Settings of production that Postgres refuses here, such as a locale of another machine: at its defaults."""


@dataclass(slots=True)
class Sandbox:
    """A Postgres that runs (or ran) isolated. Use it as a context manager: it is destroyed at the end."""

    pgdata: Path
    scratch: Path
    socket_directory: Path
    binaries: Binaries
    user: User
    control: Control
    """pg_control before recovery."""
    superuser: str
    kept: tuple[Path, ...]
    bound: tuple[tuple[Path, Path], ...]
    """Production's directories, in whose places its own are."""
    hidden: tuple[Path, ...]
    owns_data: bool
    recovery: Recovery = field(default_factory=lambda: Recovery(0.0, None, None, ()))

    @property
    def configuration(self) -> Path:
        """Its postgresql.conf."""
        return self.scratch / "postgresql.conf"

    @property
    def log_file(self) -> Path:
        """All that this Postgres said."""
        return self.scratch / "postgres.log"

    def address(self) -> session.Dsn:
        """How to reach it with `pgcdp.postgres.session`."""
        return session.Dsn(self.socket_directory, PORT, self.superuser)

    def dsn(self, database: str = "postgres") -> str:
        """A libpq connection string; no password is needed."""
        return self.address().text(database)

    def connect(self, database: str = "postgres", extra: Sequence[str] = ()) -> session.Connection:
        """An autocommit session that settings of roles and databases in the image cannot bend.

        `extra` are more server settings ("statement_timeout=5s"). Raises PreconditionError.
        """
        options = sandbox_settings.session_options(extra)
        return session.connect(self.address(), database, superuser=True, options=options, name="pgcdp sandbox")

    def environment(self) -> dict[str, str]:
        """For Postgres's own client programs: where to connect, as whom, with which session settings."""
        return cluster.environment() | {
            "PGHOST": str(self.socket_directory),
            "PGPORT": str(PORT),
            "PGUSER": self.superuser,
            "PGOPTIONS": sandbox_settings.session_options(),
        }

    def isolated(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside the same walls, as the data directory's owner."""
        order = {
            "keep": [str(path) for path in self.kept],
            "bind": [[str(own), str(place)] for place, own in self.bound],
            "hide": [str(path) for path in self.hidden],
            "uid": self.user.uid,
            "gid": self.user.gid,
            "groups": list(self.user.groups),
        }
        script = Path(__file__).with_name("isolate.py")
        return [sys.executable, "-I", str(script), json.dumps(order), *argv]

    @property
    def running(self) -> bool:
        """Whether its postmaster runs."""
        return cluster.find_postmaster(self.pgdata) is not None

    def stop(self, timeout: float = 300.0) -> None:
        """Shut it down cleanly, so that all is on disk. Raises PreconditionError when it does not end well."""
        cluster.stop(self.pgdata, timeout)

    def destroy(self) -> None:
        """End it at once and remove what it made: scratch, socket, and the data directory when it owns that."""
        end_at_once(self.pgdata)
        for directory in {self.scratch, self.socket_directory} | ({self.pgdata} if self.owns_data else set()):
            shutil.rmtree(directory, ignore_errors=True)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()


def start(
    pgdata: Path,
    settings: Mapping[str, Any] | None,
    *,
    parent: Path,
    binaries: Binaries | None = None,
    elsewhere: Mapping[Path, Path] = MappingProxyType({}),
    hide: Sequence[Path] = (),
    owns_data: bool = False,
    timeout: float = 3600.0,
    override: Mapping[str, str] = MappingProxyType({}),
    hba: Sequence[str] = (),
    name: str | None = None,
) -> Sandbox:
    """Start Postgres on `pgdata`, which must be a private copy or a mounted scratch image, and wait for recovery's end.

    `settings` is the interval's settings.json (None: pg_control alone tells the limits). `parent` holds the scratch
    directory and must be a place that the data directory's owner may enter. `elsewhere` tells where production's
    directories are in the copy, {production's: the sandbox's own}: links that name one (pg_wal, tablespaces) are made
    to lead to the other, and what WAL makes anew in one goes to the other too. `hide` are more places that it shall not
    even see; production's data directory, tablespaces and socket directories, as `settings` names them, are hidden
    anyway. Where the volume is nearly full, pg_wal moves to the scratch directory for good. With `owns_data`, `destroy`
    removes `pgdata` too. `override` are more settings, `hba` more lines of pg_hba.conf; `name`: that of the scratch
    directory, which must not exist (None: a new one).

    Raises PreconditionError when it cannot be tried (not root, no programs, a link that leads outside, a postmaster
    on it), VerificationFailed when Postgres does not come up; nothing is left then but `pgdata`.
    """
    found = cluster.inspect(Path(os.path.realpath(pgdata)))
    _refuse(found)
    moved = {place: Path(os.path.realpath(own)) for place, own in elsewhere.items()}
    outside = {place: own for place, own in moved.items() if not own.is_relative_to(found.path)}
    scratch, sockets = _make_scratch(parent, found.user, name)
    sandbox = Sandbox(
        pgdata=found.path,
        scratch=scratch,
        socket_directory=sockets,
        binaries=binaries or cluster.find_binaries(found.major),
        user=found.user,
        control=found.control,
        superuser=str(settings["superuser"]) if settings and settings.get("superuser") else "postgres",
        kept=(found.path, *dict.fromkeys((scratch, sockets, *outside.values()))),
        bound=tuple(outside.items()),
        hidden=(*hide, *_production_places(settings)),
        owns_data=owns_data,
    )
    try:
        for place in (found.path, scratch, *outside.values()):
            if not cluster.can_enter(found.user, place):
                raise PreconditionError(
                    f"user {found.user.name} cannot enter {place}",
                    "let others pass: chmod o+x on the directories above",
                )
        prepare(found.path, found.user, moved)
        give_wal_room(found.path, scratch, found.user, found.control)
        argv = _command(sandbox, override, hba)
        # To look at 100,000 files takes as long as to start postgres. Should a link among them lead outside, it cannot
        # be written through meanwhile: the third wall. One that names production's directories is led there by that.
        with ThreadPoolExecutor(1) as beside:
            looked = beside.submit(own_places, found.path, moved, below=found.path / "base")
            try:
                _run_configured(sandbox, argv, settings, timeout)
            except VerificationFailed:
                if not looked.result():  # if it is a link, that is why
                    raise
                _lead(looked.result())
                sandbox.log_file.unlink(missing_ok=True)  # what it says of the first try is no complaint about the copy
                _run_configured(sandbox, argv, settings, timeout)
            _lead(looked.result())
    except BaseException:
        sandbox.owns_data = False  # what cannot be started is not thrown away
        sandbox.destroy()
        raise
    return sandbox


def prepare(pgdata: Path, user: User, elsewhere: Mapping[Path, Path]) -> None:
    """Make a private copy fit to start: leftovers of the running cluster go, links lead as `elsewhere` tells.

    Raises PreconditionError, before anything is changed, for a link that Postgres would follow out of the sandbox;
    files of relations are not looked at (`start` does).
    """
    change = own_places(pgdata, elsewhere, besides=pgdata / "base")
    _lead(change)
    for name in _LEFTOVERS:
        (pgdata / name).unlink(missing_ok=True)
    # ALTER SYSTEM's file is read whatever the command line says. It may be a link: never write through that.
    automatic = pgdata / "postgresql.auto.conf"
    automatic.unlink(missing_ok=True)
    _write_private(automatic, "", user)


def _lead(change: Mapping[Path, Path]) -> None:
    """Have each link lead to its place; whoever looks finds one or the other."""
    for link, place in change.items():
        fresh = link.with_name(f".pgcdp-{link.name}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(place)
        fresh.rename(link)


def _refuse(found: cluster.DataDirectory) -> None:
    if os.geteuid() != 0:
        raise PreconditionError("a sandbox needs namespaces, which only root can make", "run pgcdp as root")
    if found.postmaster is not None:
        raise PreconditionError(
            f"a postmaster ({found.postmaster.pid}) runs on {found.path}: a sandbox needs a copy of its own"
        )
    if found.user.uid == 0:
        raise PreconditionError(
            f"{found.path} belongs to root, as whom Postgres does not run", f"chown -R postgres {found.path}"
        )


def _make_scratch(parent: Path, user: User, name: str | None) -> tuple[Path, Path]:
    """(scratch, socket directory), both 0700 and the user's. The path of a socket must be short."""
    try:
        if name is None:
            scratch = Path(os.path.realpath(tempfile.mkdtemp(prefix="pgcdp-sandbox-", dir=parent)))
        else:
            scratch = Path(os.path.realpath(parent)) / name
            scratch.mkdir(mode=0o700)
    except OSError as error:
        raise PreconditionError(f"cannot make a scratch directory in {parent}: {error.strerror}") from None
    sockets = scratch / "socket"
    if len(os.fsencode(sockets)) > _LONGEST_SOCKET:
        sockets = Path(tempfile.mkdtemp(prefix="pgcdp-", dir="/tmp"))
    else:
        sockets.mkdir(mode=0o700)
    for directory in (sockets, scratch):  # once the outer one is the user's, the inner name may lead anywhere
        os.chown(directory, user.uid, user.gid, follow_symlinks=False)
    return scratch, sockets


def _production_places(settings: Mapping[str, Any] | None) -> list[Path]:
    if settings is None:
        return []
    places = [settings.get("data_directory"), *(space["location"] for space in settings.get("tablespaces", ()))]
    for row in settings.get("settings", ()):
        if row["name"] == "unix_socket_directories":
            places += [word.strip().strip('"') for word in str(row["setting"]).split(",")]
    return [Path(place) for place in places if place and str(place).startswith("/")]


def end_at_once(pgdata: Path) -> None:
    """End the Postgres that runs on a private copy, if one does, and whatever it left."""
    postmaster = cluster.find_postmaster(pgdata)
    if postmaster is not None:
        with suppress(ProcessLookupError):
            os.kill(postmaster.pid, signal.SIGQUIT)
        cluster.wait_gone(postmaster, 10)
    cluster.kill_leftovers(pgdata)


def _command(
    sandbox: Sandbox,
    override: Mapping[str, str],
    hba_lines: Sequence[str],
) -> list[str]:
    """Postgres's command line, which names its configuration files; all but postgresql.conf are written."""
    hba, ident = (sandbox.scratch / name for name in ("pg_hba.conf", "pg_ident.conf"))
    fixed = {
        "data_directory": str(sandbox.pgdata),
        "config_file": str(sandbox.configuration),
        "hba_file": str(hba),
        "ident_file": str(ident),
        "unix_socket_directories": str(sandbox.socket_directory),
        "port": str(PORT),
        **override,
    }
    _write_private(hba, "".join(f"{line}\n" for line in ("local all all trust", *hba_lines)), sandbox.user)
    _write_private(ident, "", sandbox.user)
    options = sandbox_settings.options(sandbox.binaries.major, fixed)
    return [str(sandbox.binaries.path("postgres")), "-D", str(sandbox.pgdata), *options]


def _run_configured(sandbox: Sandbox, argv: Sequence[str], settings: Mapping[str, Any] | None, timeout: float) -> None:
    """Start it, with as many of production's settings for sessions as this Postgres takes."""
    refused: frozenset[str] = frozenset()
    while True:
        sandbox.configuration.unlink(missing_ok=True)
        text = sandbox_settings.configuration(settings, sandbox.control, sandbox.binaries.major, refused)
        _write_private(sandbox.configuration, text, sandbox.user)
        try:
            _run(sandbox, argv, timeout)
        except VerificationFailed:
            known = refused
            refused |= sandbox_settings.refused(sandbox.log_file.read_text(errors="replace"))
            if refused == known:
                raise
            sandbox.log_file.unlink()  # what it says of settings is no complaint about the copy
        else:
            break
    sandbox.recovery = replace(sandbox.recovery, defaults=tuple(sorted(refused)))


def _run(sandbox: Sandbox, argv: Sequence[str], timeout: float) -> None:
    started = time.monotonic()
    pid = proc.spawn(sandbox.isolated(argv), output=sandbox.log_file, env=cluster.environment())
    try:
        cluster.wait_ready(sandbox.pgdata, pid, sandbox.log_file, timeout=timeout)
    except PreconditionError as error:
        if "cannot isolate:" in error.message:
            raise PreconditionError(error.message, "a sandbox needs CAP_SYS_ADMIN and Linux 5.12 or newer") from None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise VerificationFailed(error.message, "restore to a directory and see its log for more") from None
    except BaseException:  # interrupted before it has said whose it is: nobody else would find it
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
    sandbox.recovery = read_recovery(sandbox.log_file.read_text(errors="replace"), time.monotonic() - started)


def read_recovery(log: str, seconds: float) -> Recovery:
    """What a server log tells of the crash recovery in it."""
    begin = re.search(r"redo starts at ([0-9A-F]+/[0-9A-F]+)", log)
    end = re.search(r"redo done at ([0-9A-F]+/[0-9A-F]+)", log)
    bad = [line for line in log.splitlines() if re.search(r"\] (WARNING|ERROR|FATAL|PANIC):  ", line)]
    return Recovery(
        seconds,
        parse_lsn(begin[1]) if begin else None,
        parse_lsn(end[1]) if end else None,
        tuple(line.partition("] ")[2] for line in bad if not _repeats_a_drop(line, bad)),
    )


def _repeats_a_drop(line: str, lines: Sequence[str]) -> bool:
    """Whether a warning says no more than that DROP DATABASE was replayed where its directory was gone already.

    A crash leaves that: the directory is removed behind the record, and recovery begins before both.
    """
    gone = {match[1] for each in lines if (match := _GONE.search(each)) is not None}
    match = _GONE.search(line) or _LEFT_BEHIND.search(line)
    return match is not None and match[1] in gone


def _write_private(path: Path, text: str, user: User) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        os.fchown(file, user.uid, user.gid)
        stream.write(text)
