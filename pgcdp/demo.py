"""All of pgcdp on a throw-away cluster: load, a bad DELETE, more load, and ways back around it that are proven right.

Everything lies in one fresh directory below /var/tmp: the cluster, the store, and what is otherwise below /
(PGCDP_ROOT). Afterwards, also after Ctrl-C, nothing of it is left, unless it is to be kept. When a step fails, nothing
runs any more and nothing is mounted, but the directory stays: what went wrong is in its logs.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgcdp import api, config, log, proc, transactions
from pgcdp.capture import attach, checks
from pgcdp.errors import BugError, PgcdpError, PreconditionError
from pgcdp.postgres import cluster, session
from pgcdp.progress import Progress, Report
from pgcdp.records import Target
from pgcdp.recovery.salvage import Wanted
from pgcdp.sets import list_sets

SET = "demo"
PAID = 1000
"""Orders that the bad statement deletes; the load adds others but never touches these."""
BAD_STATEMENT = "DELETE FROM orders WHERE status = 'paid'"
SIZE = 1 << 30
JOURNAL_LIMIT = 512 << 20
OWNER = "postgres"

POSTGRESQL_CONF = """
# pgcdp demo: reachable only through the socket in this directory
listen_addresses = ''
unix_socket_directories = '{sockets}'
shared_buffers = 64MB
max_wal_size = 256MB
"""
TABLE = """
CREATE TABLE orders (id bigserial PRIMARY KEY, status text NOT NULL, amount numeric, made timestamptz DEFAULT now());
INSERT INTO orders (status, amount) SELECT 'paid', 10 + n % 90 FROM generate_series(1, {paid}) AS n;
"""
LOAD = "INSERT INTO orders (status, amount) VALUES ('new', 10 + random() * 90);\n"

_log = log.get(__name__)


@dataclass
class _Demo:
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


def run(*, keep: bool, progress: Report) -> dict[str, Any]:
    """Play the demo; `keep` leaves everything running.

    Returns {"ok", "seconds", "directory", "kept", "steps", "captured", "restores", "next", "remove"}, as docs/json.md
    says. Raises what the use cases raise; the hint then says where the logs are.
    """
    checks.check_root()
    user = proc.user_named(OWNER)
    binaries = _newest_binaries(user)
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="pgcdp-demo-", dir="/var/tmp"))
    directory.chmod(0o755)  # Postgres's user must get through to the data directory
    demo = _Demo(directory, progress, binaries, user)
    with _root(demo.root):
        try:
            _make_cluster(demo)
            _protect(demo)
            points = _make_the_mistake(demo)
            _prove(demo, points)
            _step_through(demo)
            _rewind_and_undo(demo, points)
            captured = _captured()
        except Exception as error:
            if not keep:
                progress(Progress("ending what still runs"))
                _uninterrupted(_end_at_once, demo)
            told = _with_place(error, demo, keep)
            raise told from told.__cause__
        except BaseException:
            if not keep:
                progress(Progress("cleaning up"))
                _uninterrupted(_remove, demo)
            raise
        finally:
            _end_load(demo)
        if not keep:
            progress(Progress("cleaning up"))
            _uninterrupted(_remove, demo)
    return {
        "ok": all(restore["ok"] for restore in demo.restores),
        "seconds": round(time.monotonic() - began, 3),
        "directory": str(directory),
        "kept": keep,
        "steps": demo.steps,
        "captured": captured,
        "restores": demo.restores,
        "next": _next(demo, points, keep),
        "remove": _how_to_remove(demo) if keep else None,
    }


# --- the play


def _newest_binaries(user: proc.User) -> cluster.Binaries:
    for major in range(cluster.NEWEST, cluster.OLDEST - 1, -1):
        with suppress(PreconditionError):
            found = cluster.find_binaries(major, user=user)
            found.path("pgbench")
            return found
    raise PreconditionError("no PostgreSQL with pgbench is installed", "install it with: apt-get install postgresql-15")


def _make_cluster(demo: _Demo) -> None:
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


def _protect(demo: _Demo) -> None:
    with demo.step("protecting it while it runs"):
        api.protect(
            SET,
            demo.pgdata,
            demo.store,
            size=SIZE,
            journal_limit=JOURNAL_LIMIT,
            cut=("checkpoint", "5min"),
            yes=True,
        )
        _await(lambda: _window()["from_write"] is not None, "the first boundary after the baseline")
    with demo.step("filling it: pgbench -i, and a table of orders") as told:
        _pgbench(demo, "-i", "-q", "-s", "3")
        for statement in TABLE.format(paid=PAID).strip().split("\n"):
            demo.ask(statement)
        api.cut(SET)
        told["detail"] = f"{PAID} paid orders, then a boundary"


@dataclass(frozen=True)
class _Points:
    """Where the demo restores to: a boundary, and just before and just behind the bad transaction, which was found."""

    boundary: int
    xid: int


def _make_the_mistake(demo: _Demo) -> _Points:
    boundary = int(api.info(SET)["intervals"][-1]["number"])
    (demo.directory / "orders.sql").write_text(LOAD)
    log_file = demo.directory / "pgbench.log"
    with demo.step("load: pgbench and new orders, 4 clients") as told:
        # Longer than the demo lasts; it is ended when there was enough of it.
        words = ("-n", "-c", "4", "-j", "1", "-T", "3600", "-b", "tpcb-like@3", "-f", f"{demo.directory}/orders.sql@2")
        pid = proc.spawn(_pgbench_command(demo, *words), output=log_file, user=demo.user, env=cluster.environment())
        demo.load = (pid, proc.start_time(pid))
        _await_orders(demo, 2000)
        told["detail"] = f"{demo.orders('new')} new orders"
    with demo.step(f"the mistake: {BAD_STATEMENT}") as told:
        demo.ask(BAD_STATEMENT)
        told["detail"] = f"{demo.orders('paid')} paid orders are left"
    with demo.step("more load, as nobody has noticed") as told:
        _await_orders(demo, demo.orders("new") + 2000)
        _end_load(demo)
        told["detail"] = f"{demo.orders('new')} new orders"
    with demo.step("checkpoint, cutting the interval"):
        api.cut(SET)
    return _Points(boundary, _find(demo))


def _find(demo: _Demo) -> int:
    """What a DBA types who knows what was run, but not when: `pgcdp find`."""
    with demo.step(f'finding it: pgcdp find "{BAD_STATEMENT}"') as told:
        found = api.find(SET, BAD_STATEMENT)["transactions"]
        listed = api.log(SET, limit=1)["total"]
        if len(found) != 1 or found[0]["tables"][0]["deleted"] != PAID:
            raise PgcdpError(f"find names {len(found)} transactions, not the one", "pgcdp demo --keep, then pgcdp log")
        told["detail"] = f"{transactions.line(found[0])}, among {listed} transactions"
    return int(found[0]["xid"])


def _prove(demo: _Demo, points: _Points) -> None:
    for name, target, paid in (
        (f"boundary {points.boundary}, before the load", Target("boundary", points.boundary), PAID),
        ("exactly before the mistake", Target("xid", points.xid, exclusive=True), PAID),
        ("exactly behind it", Target("xid", points.xid), 0),
    ):
        with demo.step(f"verifying {name}") as told:
            assertion = demo.directory / "assertion.sql"
            assertion.write_text(f"SELECT count(*) = {paid} FROM orders WHERE status = 'paid';\n")
            value = api.verify(SET, target, sql_file=assertion)
            result = value["results"][0]
            passed = sum(check["ok"] for check in result["checks"])
            told["detail"] = f"{passed} of {len(result['checks'])} checks passed, {paid} paid orders expected"
        demo.restores.append({"name": name, "paid_orders": paid, **result})
    _bring_back(demo, points)


def _bring_back(demo: _Demo, points: _Points) -> None:
    """What a DBA does next: a directory as it was just before, and Postgres on it; then the rows, in production."""
    with demo.step(f'restoring to just before it: --before "{BAD_STATEMENT}"') as told:
        place = demo.directory / "restored"
        value = api.restore(SET, Target("newest"), before=BAD_STATEMENT, to_directory=place)
        sockets = demo.directory / "restored-sockets"
        sockets.mkdir(mode=0o700)
        os.chown(sockets, demo.user.uid, demo.user.gid)
        options = ("-c", f"unix_socket_directories={sockets}")
        command = cluster.command_line(demo.binaries, place, *options)
        cluster.start(command, place, demo.user, demo.directory / "restored.log")
        try:
            paid = int(demo.ask("SELECT count(*) FROM orders WHERE status = 'paid'", sockets))
            row = demo.ask("SELECT orders::text FROM orders WHERE status = 'paid' ORDER BY id LIMIT 1", sockets)
        finally:
            cluster.stop(place)
        told["detail"] = f"{paid} paid orders are in it, the first {row}"
    _remember(demo, "exactly before the mistake, in a directory", value, paid, PAID)
    with demo.step("putting the rows back into the live table: salvage --diff --apply") as told:
        target = Target("xid", points.xid, exclusive=True)
        value = api.salvage(SET, target, Wanted(("orders",)), diff=True, agree=lambda difference: None)
        table = value["tables"][0]
        paid = demo.orders("paid")
        told["detail"] = (
            f"{table['put_back']['inserted']} rows put back, {table['difference']['added']} newer ones kept, "
            f"{paid} paid orders in production"
        )
    whole = table["put_back"] == {"inserted": PAID, "updated": 0}
    _remember(demo, "the rows of the mistake, back in production", value, paid, PAID if whole else -1)


def _step_through(demo: _Demo) -> None:
    """A clone opens in place, whatever the size; one commit onward, the rows are gone from it."""
    name = "before-mistake"
    with demo.step(f'a clone just before it: pgcdp clone --before "{BAD_STATEMENT}"') as told:
        made = api.clone(SET, Target("newest"), before=BAD_STATEMENT, name=name)
        paid = _paid_in(made["dsn"])
        told["detail"] = f"a running Postgres after {made['seconds']:.1f} s, with {paid} paid orders"
    _remember(demo, "a clone just before the mistake", made, paid, PAID)
    with demo.step(f"one commit onward: pgcdp step {name} 1 --commit") as told:
        stepped = api.step(name, 1, commits=True)
        paid = _paid_in(stepped["dsn"])
        xids = ", ".join(str(each["xid"]) for each in stepped["transactions_in"])
        told["detail"] = (
            f"writes passed: {stepped['writes_passed']}; transaction {xids} came in, {paid} paid orders are left"
        )
    _remember(demo, "the same clone, one commit onward", stepped, paid, 0)
    api.destroy(name)


def _rewind_and_undo(demo: _Demo, points: _Points) -> None:
    """Production itself goes back, and forth again: nothing is lost by it."""
    new = demo.orders("new")
    with demo.step("rewinding production itself to just before it: restore --in-place") as told:
        value = api.rewind(SET, Target("xid", points.xid, exclusive=True), agree=lambda resolved: None)
        paid = demo.orders("paid")
        told["detail"] = (
            f"{value['bytes'] >> 20} MiB written back, down for {value['down_seconds']:.1f} s, {paid} paid and "
            f"{demo.orders('new')} new orders"
        )
    _remember(demo, "production, rewound to just before the mistake", value, paid, PAID)
    with demo.step(f"undoing that: restore --in-place --target-name {value['undo']}") as told:
        undone = api.rewind(SET, Target("name", name=value["undo"]), agree=lambda resolved: None)
        again = demo.orders("new")
        told["detail"] = f"{demo.orders('paid')} paid and {again} new orders, as before"
    _remember(demo, "production, as before the rewind", undone, demo.orders("paid"), PAID if again == new else -1)


def _paid_in(dsn: str) -> int:
    with session.connect_to(dsn) as connection:
        rows = session.query(connection, "SELECT count(*) FROM orders WHERE status = 'paid'").rows
    return int(rows[0][0]) if rows else -1


def _remember(demo: _Demo, name: str, value: dict[str, Any], paid: int, expected: int) -> None:
    ok = paid == expected and value.get("verified", True)
    demo.restores.append(
        {
            "name": name,
            "paid_orders": paid,
            "recovery_point": value["recovery_point"],
            "ok": ok,
            "seconds": value["seconds"],
            "checks": [],
        }
    )


# --- parts


@contextmanager
def _root(place: Path) -> Iterator[None]:
    """PGCDP_ROOT of this process and of all that it starts."""
    before = os.environ.get("PGCDP_ROOT")
    os.environ["PGCDP_ROOT"] = str(place)
    place.mkdir(mode=0o755)
    try:
        yield
    finally:
        del os.environ["PGCDP_ROOT"]
        if before is not None:
            os.environ["PGCDP_ROOT"] = before


def _pgbench_command(demo: _Demo, *words: str) -> list[str]:
    program = str(demo.binaries.path("pgbench"))
    return [program, "-h", str(demo.sockets), "-p", "5432", "-U", "postgres", *words, "postgres"]


def _pgbench(demo: _Demo, *words: str) -> None:
    proc.run(_pgbench_command(demo, *words), user=demo.user, env=cluster.environment(), timeout=300)


def _window() -> dict[str, Any]:
    window: dict[str, Any] | None = api.status(SET)["recovery_window"]
    return window or {"from_write": None}


def _await(condition: Callable[[], bool], what: str, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise PgcdpError(f"{what} did not come in {timeout:g} s")
        time.sleep(0.1)


def _await_orders(demo: _Demo, count: int) -> None:
    def enough() -> bool:
        pid, _ = demo.load or (0, None)
        if not proc.exists(pid):
            said = cluster.last_words(demo.directory / "pgbench.log")
            raise PgcdpError(f"pgbench ended early: {said}")
        return demo.orders("new") >= count

    _await(enough, f"{count} orders")


def _end_load(demo: _Demo) -> None:
    if demo.load is None:
        return
    pid, started = demo.load
    if started is not None and proc.start_time(pid) == started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        _await(lambda: not proc.exists(pid), "the end of pgbench", 30)
    demo.load = None


def _captured() -> dict[str, Any]:
    intervals = api.info(SET)["intervals"]
    return {
        "intervals": len(intervals),
        "writes": sum(interval["writes"] for interval in intervals),
        "bytes_written": sum(interval["bytes_written"] for interval in intervals),
        "stored_bytes": sum(sum(interval["stored"].values()) for interval in intervals),
    }


def _next(demo: _Demo, points: _Points, keep: bool) -> list[str]:
    """Commands to look further with."""
    if not keep:
        return ["pgcdp demo --keep", "pgcdp protect --help"]
    prefix = f"PGCDP_ROOT={demo.root} pgcdp"
    return [
        f"{prefix} status",
        f"{prefix} info",
        f'{prefix} find "{BAD_STATEMENT}"',
        f"{prefix} log --op delete",
        f"{prefix} verify --target-xid {points.xid} --exclusive",
        f"psql -h {demo.sockets} -U postgres",
    ]


def _how_to_remove(demo: _Demo) -> str:
    return f"PGCDP_ROOT={demo.root} pgcdp down && rm -r {demo.directory}"


def _with_place(error: Exception, demo: _Demo, keep: bool) -> PgcdpError:
    """The error of a step, which says where the logs are."""
    told = error if isinstance(error, PgcdpError) else BugError(
        f"unexpected {type(error).__name__}: {error}".rstrip(": "),
        "please report this with the traceback, which PGCDP_DEBUG=1 prints",
    )  # fmt: skip
    if told is not error:
        told.__cause__ = error
    remove = _how_to_remove(demo) if keep else f"rm -r {demo.directory}"
    place = f"all files and logs are kept in {demo.directory}, to be removed with: {remove}"
    told.hint = f"{told.hint}; {place}" if told.hint else place
    return told


def _uninterrupted(action: Callable[[_Demo], None], demo: _Demo) -> None:
    """Ctrl-C does not stop it half way."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        action(demo)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove(demo: _Demo) -> None:
    """Take down what there is and remove the directory."""
    _end_load(demo)
    try:
        for each in api.clones()["clones"]:
            api.destroy(each["name"])
        if SET in list_sets():
            api.down(SET)
    except PgcdpError as error:
        _log.warning("the demo does not go down cleanly, it is discarded: %s", error)
    _end_at_once(demo)
    shutil.rmtree(demo.directory)


def _end_at_once(demo: _Demo) -> None:
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


def _started(demo: _Demo) -> list[int]:
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
