"""The throw-away set of the demo: its places, its cluster, the load on it, and taking all of it away again."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgcdp import api, config, log, proc
from pgcdp.capture import attach
from pgcdp.errors import BugError, PgcdpError, PreconditionError
from pgcdp.postgres import cluster, session
from pgcdp.progress import Progress, Report
from pgcdp.sets import list_sets

SET = "demo"
POSTGRESQL_CONF = """
# pgcdp demo: reachable only through the socket in this directory
listen_addresses = ''
unix_socket_directories = '{sockets}'
shared_buffers = 64MB
max_wal_size = 256MB
"""

_log = log.get(__name__)


@dataclass
class Throwaway:
    """One run: its places, and what it has to tell. Times are seconds."""

    directory: Path
    report: Report
    binaries: cluster.Binaries
    user: proc.User
    steps: list[dict[str, Any]] = field(default_factory=list)
    restores: list[dict[str, Any]] = field(default_factory=list)
    load: tuple[int, int | None] | None = None

    @property
    def pgdata(self) -> Path:
        return self.directory / "data"

    @property
    def root(self) -> Path:
        return self.directory / "root"

    @property
    def store(self) -> Path:
        return self.directory / "store"

    @property
    def sockets(self) -> Path:
        return self.directory / "sockets"

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Tell and time one step; what is put under "detail" is told with it."""
        told: dict[str, Any] = {"name": name, "seconds": 0.0, "detail": ""}
        self.report(Progress(name))
        began = time.monotonic()
        try:
            yield told
        except BaseException:
            self.report(Progress(name, failed=True))
            raise
        told["seconds"] = round(time.monotonic() - began, 3)
        self.steps.append(told)

    def ask(self, sql: str, sockets: Path | None = None) -> Any:
        """The first value that a statement gives, or None."""
        dsn = session.Dsn(sockets or self.sockets, 5432)
        with session.connect_as_client(dsn, name="pgcdp demo") as connection:
            rows = session.query(connection, sql).rows
        return rows[0][0] if rows else None

    def orders(self, status: str) -> int:
        """How many orders production has now."""
        return int(self.ask(f"SELECT count(*) FROM orders WHERE status = '{status}'"))


def newest_binaries(user: proc.User) -> cluster.Binaries:
    """The newest PostgreSQL that is installed with pgbench."""
    for major in range(cluster.NEWEST, cluster.OLDEST - 1, -1):
        with suppress(PreconditionError):
            found = cluster.find_binaries(major, user=user)
            found.path("pgbench")
            return found
    raise PreconditionError("no PostgreSQL with pgbench is installed", "install it with: apt-get install postgresql-15")


def make_cluster(demo: Throwaway) -> None:
    """A fresh cluster, started, that only its own socket leads to."""
    with demo.step(f"making a cluster of PostgreSQL {demo.binaries.major}"):
        for place in (demo.pgdata, demo.sockets):
            place.mkdir(mode=0o700)
            os.chown(place, demo.user.uid, demo.user.gid)
        options = ("--auth=trust", "--data-checksums", "--locale=C", "--encoding=UTF8")
        cluster.initdb(demo.binaries, demo.pgdata, demo.user, *options)
        with (demo.pgdata / "postgresql.conf").open("a") as file:
            file.write(POSTGRESQL_CONF.format(sockets=demo.sockets))
        command = cluster.command_line(demo.binaries, demo.pgdata)
        cluster.start(command, demo.pgdata, demo.user, demo.directory / "postgres.log")


@contextmanager
def rooted_at(place: Path) -> Iterator[None]:
    """PGCDP_ROOT of this process and of all that it starts."""
    before = os.environ.get("PGCDP_ROOT")
    os.environ["PGCDP_ROOT"] = str(place)
    place.mkdir()
    place.chmod(0o755)  # whatever the umask says
    try:
        yield
    finally:
        del os.environ["PGCDP_ROOT"]
        if before is not None:
            os.environ["PGCDP_ROOT"] = before


def pgbench_command(demo: Throwaway, *words: str) -> list[str]:
    """The command line of pgbench on the cluster."""
    program = str(demo.binaries.path("pgbench"))
    return [program, "-h", str(demo.sockets), "-p", "5432", "-U", "postgres", *words, "postgres"]


def pgbench(demo: Throwaway, *words: str) -> None:
    """Run pgbench to its end."""
    proc.run(pgbench_command(demo, *words), user=demo.user, env=cluster.environment(), timeout=300)


def await_until(condition: Callable[[], bool], what: str, timeout: float = 120.0) -> None:
    """Raises PgcdpError when the condition does not come true in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise PgcdpError(f"{what} did not come in {timeout:g} s")
        time.sleep(0.1)


def await_orders(demo: Throwaway, count: int) -> None:
    """Until production has so many new orders. Raises PgcdpError when the load ended before."""

    def enough() -> bool:
        pid, _ = demo.load or (0, None)
        if not proc.exists(pid):
            said = cluster.last_words(demo.directory / "pgbench.log")
            raise PgcdpError(f"pgbench ended early: {said}")
        return demo.orders("new") >= count

    await_until(enough, f"{count} orders")


def end_load(demo: Throwaway) -> None:
    """End the load when it runs."""
    if demo.load is None:
        return
    pid, started = demo.load
    if started is not None and proc.start_time(pid) == started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        await_until(lambda: not proc.exists(pid), "the end of pgbench", 30)
    demo.load = None


def with_place(error: Exception, demo: Throwaway, keep: bool) -> PgcdpError:
    """The error of a step, which says where the logs are."""
    told = error if isinstance(error, PgcdpError) else BugError(
        f"unexpected {type(error).__name__}: {error}".rstrip(": "),
        "please report this with the traceback, which PGCDP_DEBUG=1 prints",
    )  # fmt: skip
    if told is not error:
        told.__cause__ = error
    remove = how_to_remove(demo) if keep else f"rm -r {demo.directory}"
    place = f"all files and logs are kept in {demo.directory}, to be removed with: {remove}"
    told.hint = f"{told.hint}; {place}" if told.hint else place
    return told


def how_to_remove(demo: Throwaway) -> str:
    """The commands that take away a demo that was kept."""
    return f"PGCDP_ROOT={demo.root} pgcdp down && rm -r {demo.directory}"


def uninterrupted(action: Callable[[Throwaway], None], demo: Throwaway) -> None:
    """Ctrl-C does not stop it half way."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        action(demo)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def remove(demo: Throwaway) -> None:
    """Take down what there is and remove the directory."""
    end_load(demo)
    try:
        for each in api.clones()["clones"]:
            api.destroy(each["name"])
        if SET in list_sets():
            api.down(SET)
    except PgcdpError as error:
        _log.warning("the demo does not go down cleanly, it is discarded: %s", error)
    end_at_once(demo)
    shutil.rmtree(demo.directory)


def end_at_once(demo: Throwaway) -> None:
    """End all that the demo started, in whatever state it is, and unmount what is mounted; the files stay."""
    while started := _started(demo):
        for pid in started:  # all at once: Postgres may hang on capture, and the agent would start that again
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in started:
            attach.kill_and_wait(pid)
    with suppress(PgcdpError):
        for each in api.clones()["clones"]:
            api.destroy(each["name"])
    if SET in list_sets():
        attach.discard(config.load_config(SET))
    for place in (demo.pgdata, demo.directory / "restored"):
        if place.is_dir():
            cluster.kill_leftovers(place)


def _started(demo: Throwaway) -> list[int]:
    """Processes with the demo's root in their environment, which no others have: agent, capture, views, pgbench.

    Postgres has written its titles over its own: it is known by its data directory.
    """
    root = f"PGCDP_ROOT={demo.root}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if root in place.read_bytes().split(b"\0") and int(place.parent.name) != os.getpid():
                found.append(int(place.parent.name))
    return found
