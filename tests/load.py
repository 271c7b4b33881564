"""A load that knows what it was promised, and the judge of what a restored cluster kept of it.

`Load` runs pgbench, *ledger* clients that note outside of the database every commit that was acknowledged to them,
and a *churn* client that creates, drops, truncates, vacuums full and runs two-phase transactions. `WalCopy` keeps
an untouched copy of the WAL, from which pg_waldump tells the true order of commits. `check_prefix` then says whether
the commits present in a restored cluster are a prefix of that order and hold every one acknowledged before a moment.
"""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psycopg

from pgcdp import proc
from pgcdp.postgres import cluster, session
from pgcdp.postgres.cluster import Binaries
from pgcdp.proc import User
from pgcdp.units import parse_lsn
from tests.waiting import wait_until

CHURN_COMMITTED, CHURN_ROLLED_BACK = 1000, 1001
"""Ledger client numbers of the two-phase transactions."""

ALLOWED = (r"FATAL:  connection to client lost", r"LOG:  could not send data to client")
"""What the end of pgbench leaves in the server's log."""

_LEDGER = """
create table if not exists ledger (client int, counter bigint, xid bigint, filler text, primary key (client, counter))
"""
_INSERT = """
insert into ledger values (%s, %s, pg_current_xact_id()::text::bigint, repeat(md5(%s), 4)) returning xid
"""
_COMMIT = re.compile(rb"tx:\s+(\d+), lsn: ([0-9A-F]+/[0-9A-F]+), .*? desc: (COMMIT|COMMIT_PREPARED) (?:(\d+): )?\d{4}-")


class Connectable(Protocol):
    """A running cluster: a `Live` of fix_postgres or a `Sandbox`."""

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]: ...


@dataclass(frozen=True, slots=True)
class Ack:
    """A commit that Postgres acknowledged: `xid` has 64 bits, times are CLOCK_REALTIME ns."""

    client: int
    counter: int
    xid: int
    sent_ns: int
    acked_ns: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit record: the low 32 bits of its transaction, and where the record begins."""

    xid: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Result:
    """All acknowledged commits in order of acknowledgement, and what ended a client before it was asked to."""

    acks: list[Ack]
    failures: list[str]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a restored cluster holds: how many commits of the order, ledger rows, and promises that bound it."""

    commits: int
    of_commits: int
    ledger_rows: int
    promised: int
    balance: int


@dataclass
class Load:
    """Clients on one cluster. `prepare`, `start`, `stop`; a client that fails meanwhile is told by `stop`.

    `rate`: pgbench's transactions a second, of all `clients` together (0: as many as there can be). `churn_pause`:
    seconds between two rounds of the churn client.
    """

    address: session.Dsn
    binaries: Binaries
    user: User
    clients: int = 8
    ledgers: int = 8
    scale: int = 5
    churn: bool = True
    rate: int = 0
    churn_pause: float = 0.05
    _acks: list[Ack] = field(default_factory=list)
    _failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _pgbench: subprocess.Popen[str] | None = None

    def prepare(self) -> None:
        """Make pgbench's tables and the ledger. Two-phase transactions need max_prepared_transactions of at least 2."""
        self._program("pgbench", "-i", "-q", "-s", str(self.scale), "postgres")
        with self._connect() as connection:
            connection.execute(_LEDGER)

    def start(self) -> None:
        """Let all clients run."""
        if self.clients:
            self._pgbench = self._start_pgbench()
        work: list[tuple[Callable[[int], None], int]] = [(self._ledger, number) for number in range(self.ledgers)]
        if self.churn:
            work.append((self._churn, 0))
        for function, number in work:
            thread = threading.Thread(target=self._guarded, args=(function, number), daemon=True)
            self._threads.append(thread)
            thread.start()

    def acknowledged(self) -> int:
        """How many commits the ledger clients have been promised so far."""
        return len(self._acks)

    def acks(self) -> list[Ack]:
        """What the ledger clients have been promised so far."""
        return list(self._acks)

    def wait_for(self, count: int, timeout: float = 60) -> None:
        """Return when `count` more commits have been acknowledged."""
        goal = self.acknowledged() + count
        wait_until(
            lambda: self.acknowledged() >= goal or bool(self._failures), timeout=timeout, what=f"{count} commits"
        )

    def stop(self) -> Result:
        """End all clients and give what they were promised. Clients that a crash ended are among `failures`."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client does not end"
        if self._pgbench is not None:
            ended = self._pgbench.poll()
            if ended is None:
                self._pgbench.send_signal(signal.SIGINT)
            said = self._pgbench.communicate(timeout=60)[1]
            if ended is not None or "error" in said.lower():
                self._failures.append(f"pgbench ({ended}): {said[-500:]}")
        return Result(sorted(self._acks, key=lambda ack: ack.acked_ns), list(self._failures))

    def _connect(self) -> psycopg.Connection[Any]:
        return session.connect_as_client(self.address)

    def _environment(self) -> dict[str, str]:
        own = {
            "PGHOST": str(self.address.socket_directory),
            "PGPORT": str(self.address.port),
            "PGUSER": self.address.role,
        }
        return cluster.environment() | own

    def _program(self, name: str, *arguments: str) -> None:
        proc.run([str(self.binaries.path(name)), *arguments], user=self.user, env=self._environment())

    def _start_pgbench(self) -> subprocess.Popen[str]:
        words = [str(self.binaries.path("pgbench")), "-n", "-c", str(self.clients), "-j", "2", "-T", "100000"]
        limit = ["-R", str(self.rate)] if self.rate else []
        return subprocess.Popen(
            [*words, *limit, "postgres"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=self._environment(),
            user=self.user.uid,
            group=self.user.gid,
            extra_groups=self.user.groups,
        )

    def _guarded(self, function: Callable[[int], None], number: int) -> None:
        try:
            function(number)
        except Exception as error:
            self._failures.append(f"{function.__name__} {number}: {error}")

    def _ledger(self, client: int) -> None:
        with self._connect() as connection:
            counter = 0
            while not self._stop.is_set():
                counter += 1
                sent = time.time_ns()
                row = connection.execute(_INSERT, [client, counter, str(counter)]).fetchone()
                acked = time.time_ns()
                assert row is not None
                self._acks.append(Ack(client, counter, row[0], sent, acked))

    def _churn(self, _: int) -> None:
        with self._connect() as connection:
            for counter in range(1, 1 << 40):
                name = f"churn_{counter % 3}"
                connection.execute(f"drop table if exists {name}".encode())
                connection.execute(
                    f"create table {name} as select n, repeat('x', 200) as v from generate_series(1, 2000) n".encode()
                )
                connection.execute(f"create index on {name} (n)".encode())
                self._two_phase(connection, counter)
                connection.execute(f"vacuum full {name}".encode())
                if counter % 2:
                    connection.execute(f"truncate {name}".encode())
                    connection.execute(f"insert into {name} select n, 'y' from generate_series(1, 500) n".encode())
                if self._stop.wait(self.churn_pause):
                    return

    def _two_phase(self, connection: psycopg.Connection[Any], counter: int) -> None:
        for client, verb in ((CHURN_COMMITTED, "commit"), (CHURN_ROLLED_BACK, "rollback")):
            connection.execute("begin")
            row = connection.execute(_INSERT, [client, counter, verb]).fetchone()
            connection.execute(f"prepare transaction '{verb}_{counter}'".encode())
            sent = time.time_ns()
            connection.execute(f"{verb} prepared '{verb}_{counter}'".encode())
            assert row is not None
            if client == CHURN_COMMITTED:
                self._acks.append(Ack(client, counter, row[0], sent, time.time_ns()))


@dataclass
class WalCopy:
    """pg_receivewal with a slot into `directory`, which must not exist; see `keep`."""

    address: session.Dsn
    binaries: Binaries
    user: User
    directory: Path
    slot: str = "wal_copy"
    begin_lsn: int = 0
    _process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Make the slot and receive from now on; commits from `begin_lsn` on will be in the copy."""
        self.directory.mkdir(mode=0o700)
        proc.run(["chown", self.user.name, str(self.directory)])
        with session.connect_as_client(self.address) as connection:
            made = connection.execute(
                "select pg_create_physical_replication_slot(%s, true), pg_current_wal_lsn()::text", [self.slot]
            ).fetchone()
        assert made is not None
        self.begin_lsn = parse_lsn(made[1])
        self._process = subprocess.Popen(
            [
                str(self.binaries.path("pg_receivewal")),
                f"--directory={self.directory}",
                f"--slot={self.slot}",
                "--no-loop",
                "--status-interval=1",
                f"--host={self.address.socket_directory}",
                f"--port={self.address.port}",
                f"--username={self.address.role}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            env=cluster.environment(),
            user=self.user.uid,
            group=self.user.gid,
            extra_groups=self.user.groups,
        )
        wait_until(self._streams, what="pg_receivewal that streams")

    def stop(self) -> None:
        """Wait until all WAL of this moment has come, end the receiver, drop the slot. The cluster must run."""
        assert self._process is not None
        with session.connect_as_client(self.address) as connection:
            row = connection.execute("select pg_current_wal_flush_lsn()::text").fetchone()
            assert row is not None
            wait_until(lambda: self._received(connection, row[0]), what=f"WAL up to {row[0]} in the copy")
            self.end()
            wait_until(lambda: not self._active(connection), what="free slot")
            connection.execute("select pg_drop_replication_slot(%s)", [self.slot])

    def end(self) -> None:
        """End the receiver alone, for a cluster that is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)

    def _streams(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"pg_receivewal ended: {self._process.communicate()[1]}")
        with session.connect_as_client(self.address) as connection:
            return self._active(connection)

    def _active(self, connection: psycopg.Connection[Any]) -> bool:
        sql = "select active from pg_replication_slots where slot_name = %s"
        return connection.execute(sql, [self.slot]).fetchone() == (True,)

    def _received(self, connection: psycopg.Connection[Any], lsn: str) -> bool:
        sql = "select coalesce(max(write_lsn), '0/0') >= %s::pg_lsn from pg_stat_replication"
        return connection.execute(sql, [lsn]).fetchone() == (True,)

    def order(self) -> list[Commit]:
        """All commits in the copy from `begin_lsn` on, in order, by pg_waldump. The receiver must have ended."""
        return commit_order(self.binaries, self.directory, self.begin_lsn)


@contextmanager
def keep_wal(address: session.Dsn, binaries: Binaries, user: User, directory: Path) -> Iterator[WalCopy]:
    """A running WalCopy; its receiver is ended in any case. Call `stop` for the whole copy."""
    copy = WalCopy(address, binaries, user, directory)
    try:
        copy.start()
        yield copy
    finally:
        copy.end()


def commit_order(binaries: Binaries, directory: Path, begin_lsn: int = 0) -> list[Commit]:
    """Commit records in the WAL files of `directory`, in order, from `begin_lsn` on."""
    for partial in directory.glob("*.partial"):
        whole = partial.with_suffix("")
        if not whole.exists():
            partial.rename(whole)
    segments = sorted(file for file in directory.iterdir() if re.fullmatch("[0-9A-F]{24}", file.name))
    if not segments:
        return []
    words = [str(binaries.path("pg_waldump")), "--rmgr=Transaction", segments[0].name, segments[-1].name]
    # It ends with an error where the WAL ends; what came before is what counts.
    done = subprocess.run(words, cwd=directory, capture_output=True, check=False)
    assert done.returncode == 0 or re.search(rb"invalid|could not find|error in WAL record", done.stderr), done.stderr
    found = [
        Commit(int(match[4] or match[1]), parse_lsn(match[2].decode()))
        for line in done.stdout.splitlines()
        if (match := _COMMIT.search(line))
    ]
    return [commit for commit in found if commit.lsn >= begin_lsn]


def check_prefix(
    restored: Connectable, acks: Sequence[Ack], order: Sequence[Commit], captured_before_ns: int = 0
) -> Judgement:
    """Judge a restored cluster; AssertionError says what is wrong.

    Every commit acknowledged before `captured_before_ns` (when the write of the recovery point was captured) must be
    there; the commits that are there must be a prefix of `order`; the ledger must hold exactly what they wrote;
    nothing of a rolled back transaction; pgbench's four sums must agree.
    Judge before anything else writes there (amcheck's extension, for one): new transactions take up the xids of those
    that were lost. The cluster must be young enough to be in epoch 0.
    """
    with restored.connect() as connection:
        present = _present(connection, [commit.xid for commit in order])
        rows = connection.execute("select client, counter, xid from ledger").fetchall()
        sums = _sums(connection)
    length = next((place for place, there in enumerate(present) if not there), len(order))
    beyond = [order[place] for place in range(length, len(order)) if present[place]]
    assert not beyond, (
        f"not a prefix: commit {length} of {len(order)} ({order[length]}) is missing, "
        f"but {len(beyond)} later ones are there, the first {beyond[0]}"
    )
    committed = {commit.xid for commit in order[:length]}
    known = {commit.xid for commit in order}
    promised = [ack for ack in acks if ack.acked_ns < captured_before_ns]
    missing = [ack for ack in promised if ack.xid & 0xFFFFFFFF in known and ack.xid & 0xFFFFFFFF not in committed]
    assert not missing, f"{len(missing)} of {len(promised)} acknowledged commits are missing, the first {missing[0]}"
    _check_ledger(rows, acks, promised, committed, known)
    assert len(set(sums.values())) == 1, f"pgbench's sums differ: {sums}"
    return Judgement(length, len(order), len(rows), len(promised), next(iter(sums.values())))


def _check_ledger(
    rows: Sequence[tuple[Any, ...]], acks: Sequence[Ack], promised: Sequence[Ack], committed: set[int], known: set[int]
) -> None:
    """Rows and commits tell the same story."""
    held = {(client, counter): xid for client, counter, xid in rows}
    assert len(held) == len(rows), "a ledger row is there twice"
    undone = [key for key in held if key[0] == CHURN_ROLLED_BACK]
    assert not undone, f"rows of rolled back transactions are there: {undone[:3]}"
    lost = [ack for ack in promised if held.get((ack.client, ack.counter)) != ack.xid]
    assert not lost, f"{len(lost)} ledger rows of acknowledged commits are missing, the first {lost[0]}"
    early = [key for key, xid in held.items() if xid & 0xFFFFFFFF in known and xid & 0xFFFFFFFF not in committed]
    assert not early, f"rows of transactions that did not commit are there: {early[:3]}"
    half = [ack for ack in acks if ack.xid & 0xFFFFFFFF in committed and (ack.client, ack.counter) not in held]
    assert not half, f"commits without their rows: {half[:3]}"
    for client in {key[0] for key in held if key[0] != CHURN_COMMITTED}:
        counters = sorted(counter for each, counter in held if each == client)
        assert counters == list(range(1, len(counters) + 1)), f"ledger client {client} has gaps"


def _present(connection: psycopg.Connection[Any], xids: Sequence[int]) -> list[bool]:
    """For each xid (low 32 bits, epoch 0) whether it committed. One that was never given out did not."""
    rows = connection.execute(
        """
        select case when x < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
                    then pg_xact_status(x::text::xid8) = 'committed' else false end
        from unnest(%s::bigint[]) with ordinality as given(x, place) order by place
        """,
        [list(xids)],
    ).fetchall()
    return [bool(row[0]) for row in rows]


def _sums(connection: psycopg.Connection[Any]) -> dict[str, int]:
    columns = {"accounts": "abalance", "branches": "bbalance", "tellers": "tbalance", "history": "delta"}
    found = {}
    for table, column in columns.items():
        with suppress(psycopg.errors.UndefinedTable):
            row = connection.execute(f"select coalesce(sum({column}), 0) from pgbench_{table}".encode()).fetchone()
            found[table] = int(row[0]) if row else 0
    return found or {"nothing": 0}
