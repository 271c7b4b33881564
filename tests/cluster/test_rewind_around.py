"""Who watches a cluster that is rewound, or follows it, and what is said when it cannot be rewound."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest

from pgcdp import api
from pgcdp.capture import attach
from pgcdp.errors import PreconditionError
from pgcdp.postgres import cluster
from pgcdp.records import Target
from pgcdp.store.layout import TIMELINES
from tests.cluster.test_rewind import WITHOUT_START, agreed, ledger, point_without_start, rewind, run, timeline, undo
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import PORT, MakeSet, ProtectedSet
from tests.namespaces import LET_GO
from tests.waiting import wait_until


@contextmanager
def following(found: ProtectedSet, *words: str) -> Iterator[Path]:
    """`pgcdp log --follow` in a process of its own; the file with all that it says."""
    said = found.root / "followed"
    code = "import sys; from pgcdp.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "log", found.name, "--follow", *words]
    with said.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd="/") as running:
        try:
            yield said
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(timeout=60)


def commit(found: ProtectedSet, number: int) -> str:
    """A transaction; its id."""
    sql = f"insert into ledger values ({number}) returning pg_current_xact_id()::text"
    return str(found.sql(sql)[0][0])


def test_log_follow_goes_on_with_the_new_branch(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20)
    found.sql("create table ledger (n int primary key)")

    def told(said: Path, what: str) -> bool:
        return what in said.read_text()

    with following(found, "--table", "ledger", "--op", "insert") as said:
        kept = commit(found, 1)
        with found.connect() as session:  # it ends before the point, behind the last commit there
            session.execute("begin; insert into ledger values (7); rollback")
        wait_until(lambda: told(said, " aborted "), timeout=60, what="the one that was rolled back")
        point = found.durable()
        left = commit(found, 2)
        wait_until(lambda: told(said, f"  {left}  "), timeout=60, what="the one before the rewind")
        first = rewind(found, Target("write", point))
        wait_until(lambda: told(said, "rewound"), timeout=60, what="the line that says so")
        new = commit(found, 3)
        wait_until(lambda: said.read_text().count("committed") == 3, timeout=60, what="one on the new branch")
        undo(found, first)
        wait_until(lambda: said.read_text().count("rewound") == 2, timeout=60, what="the second line")
        last = commit(found, 4)
        wait_until(lambda: said.read_text().count("committed") == 4, timeout=60, what="one behind the undoing")
    lines = said.read_text().splitlines()[1:]
    xids = [line.split()[1] if line[:2] == "20" else line for line in lines if line not in ("", "interrupted")]
    assert xids[0] == kept
    aborted = xids[1]
    where = [f"set {found.name} was rewound to write {point}: what follows is on its new branch"]
    assert xids[:5] == [kept, aborted, left, *where, new]
    assert xids[5].startswith(f"set {found.name} was rewound to write ")
    assert xids[6:] == [last]


def test_check_tells_of_a_rewind_that_has_not_ended_and_of_lost_timelines(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=WITHOUT_START)

    def checks() -> dict[str, dict[str, object]]:
        return {each["name"]: each for each in api.check(found.name)["checks"]}

    found.sql("create table ledger (n int primary key)")
    wrong = point_without_start(found)
    found.sql("insert into ledger values (1)")
    assert checks()["rewind"]["ok"]
    with pytest.raises(PreconditionError, match="did not come up"):
        api.rewind(found.name, Target("write", wrong), agree=agreed)
    told = checks()["rewind"]
    assert (told["ok"], told["kind"]) == (False, "precondition")
    assert f"to write {wrong} has not ended" in str(told["detail"])
    hint = str(told["hint"])
    assert f"pgcdp up {found.name} finishes it" in hint
    mark = hint.split("--target-name ")[1].split()[0]
    api.rewind(found.name, Target("name", name=mark), agree=agreed)
    assert ledger(found) == [1]
    rewind(found, Target("write", found.durable()))
    rewind(found, Target("write", found.durable()))
    kept = found.store / TIMELINES
    assert "3 timelines of rewinds" in str(checks()["store"]["detail"])
    listed = api.log(found.name, limit=None)["transactions"]
    kept.rename(found.root / "elsewhere")
    assert [each["xid"] for each in api.log(found.name, limit=None)["transactions"]] == [each["xid"] for each in listed]
    told = checks()["store"]
    assert (told["ok"], told["kind"]) == (False, "damage")
    missing = [each["detail"] for each in api.check(found.name)["checks"] if each["name"] == "store"]
    assert any(f"{kept / 'archived.json'} is missing" in detail for detail in missing)
    assert any(f"{kept / '00000002.history'} is missing" in detail for detail in missing)
    (found.root / "elsewhere").rename(kept)
    assert checks()["store"]["ok"]


@pytest.mark.parametrize("version", [15, 17])
def test_wal_level_minimal_is_refused_beforehand(make_set: MakeSet, binaries_of: BindirOf, version: int) -> None:
    """Now, since it could not be undone; and at the point, where Postgres would not come up."""
    bare = {"wal_level": "minimal", "max_wal_senders": "0"}
    found = make_set(binaries_of(version), size=384 << 20, settings=bare)
    found.sql("create table ledger (n int primary key)")
    point = found.durable()
    found.sql("insert into ledger values (1)")

    def refused(words: str) -> None:
        begun = found.sql("select pg_postmaster_start_time()")
        code, _, said = run("restore", found.name, "--target-write", str(point), "--in-place", "--yes")
        assert (code, words in said) == (6, True), said
        assert found.sql("select pg_postmaster_start_time()") == begun, "Postgres was stopped"
        assert ledger(found) == [1]
        assert not found.config.paths.rewind_state.exists()
        assert found.source().rewinds() == []

    refused(f"wal_level was minimal at write {point}")
    found.sql("alter system set wal_level = replica")
    api.down(found.name)
    api.up(found.name)
    refused(f"wal_level was minimal at write {point}")
    first = found.durable()
    found.sql("insert into ledger values (2)")
    told = rewind(found, Target("write", first))
    assert ledger(found) == [1]
    undo(found, told)
    assert ledger(found) == [1, 2]
    found.sql("alter system reset wal_level")
    api.down(found.name)
    api.up(found.name)
    code, _, said = run("restore", found.name, "--target-write", str(first), "--in-place", "--yes")
    assert (code, "to undo the rewind" in said) == (6, True), said
    assert ledger(found) == [1, 2]


class Standby:
    """A physical standby below `root`, which streams from the set's socket."""

    def __init__(self, found: ProtectedSet, root: Path) -> None:
        self.found, self.root, self.user = found, root, postgres_user()
        self.pgdata, self.log = root / "data", root / "log"
        root.mkdir(mode=0o700)
        os.chown(root, self.user.uid, self.user.gid)

    def make(self) -> None:
        """Anew, by pg_basebackup -R."""
        shutil.rmtree(self.pgdata, ignore_errors=True)
        where = f"host={self.found.sockets} port={PORT} user=postgres application_name=near"
        words = ["pg_basebackup", "-d", where, "-D", str(self.pgdata), "-R", "-X", "stream", "-S", "near", "-c", "fast"]
        program = str(self.found.binaries.path(words[0]))
        subprocess.run([program, *words[1:]], check=True, user="postgres", group="postgres", extra_groups=[], cwd="/")

    def start(self) -> None:
        own = ("-c", f"unix_socket_directories={self.root}", "-c", "listen_addresses=", "-c", "hot_standby=on")
        argv = cluster.command_line(self.found.binaries, self.pgdata, *own)
        cluster.start(argv, self.pgdata, self.user, self.log)

    def rows(self) -> list[int]:
        with psycopg.connect(f"host={self.root} port={PORT} user=postgres dbname=postgres") as session:
            return [row[0] for row in session.execute("select n from ledger order by n")]


def test_standbys_subscribers_and_slots_are_named_with_commands_that_work(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    found = make_set(
        binaries_of(15), size=512 << 20, settings={"wal_level": "logical"},
        allowed=[r"requested starting point", r"not in this server's history", r'slot "feed" does not exist'],
    )  # fmt: skip
    found.sql("create table ledger (n int primary key)")
    found.sql("select pg_create_physical_replication_slot('near', true)")
    point = found.durable()
    found.sql("select pg_create_logical_replication_slot('feed', 'test_decoding')")
    standby = Standby(found, found.root / "standby")
    reader = found.program("pg_recvlogical", "-d", "postgres", "-S", "feed", "--start", "-f", "-")
    with subprocess.Popen(reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/") as subscriber:
        try:
            standby.make()
            standby.start()
            found.sql("insert into ledger values (1)")
            wait_until(lambda: standby.rows() == [1], timeout=60, what="the row on the standby")
            wait_until(
                lambda: found.sql("select count(*) from pg_stat_replication") == [(2,)],
                timeout=60,
                what="both followers",
            )
            told = rewind(found, Target("write", point))
            by_kind = {(each["kind"], each["name"]): each["command"] for each in told["followers"]}
            assert set(by_kind) == {
                ("standby", "near"), ("subscriber", "pg_recvlogical"), ("physical slot", "near"),
                ("logical slot", "feed"),
            }  # fmt: skip
            assert "pg_basebackup -R" in by_kind["standby", "near"]
            assert timeline(found) == 2
            assert ledger(found) == []
            cluster.stop(standby.pgdata)
            for kind, name in (("physical slot", "near"), ("logical slot", "feed")):
                command = by_kind[kind, name].removeprefix("in postgres: ").split("; and ")[0]
                for statement in filter(None, map(str.strip, command.split(";"))):
                    found.sql(statement)
            assert found.sql("select slot_name::text from pg_replication_slots order by 1") == [("feed",), ("near",)]
            standby.make()
            standby.start()
            found.sql("insert into ledger values (2)")
            wait_until(lambda: standby.rows() == [2], timeout=60, what="the new branch's row on the standby")
        finally:
            subscriber.terminate()
            if cluster.find_postmaster(standby.pgdata) is not None:
                cluster.stop(standby.pgdata)


@contextmanager
def mounted_in_another_namespace(found: ProtectedSet) -> Iterator[None]:
    """A process that has a copy of all mounts, as a container or a backup job may."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{LET_GO}; exec sleep infinity"]
    with subprocess.Popen(command, env={**os.environ, "KEEP": str(found.root)}) as holder:
        try:
            name = Path(f"/proc/{holder.pid}/comm")
            wait_until(lambda: name.read_text().strip() == "sleep", what="a namespace of its own")
            yield
        finally:
            holder.kill()


@contextmanager
def mounted_at_another_place(found: ProtectedSet) -> Iterator[None]:
    place = found.root / "bound"
    place.mkdir()
    subprocess.run(["mount", "--bind", found.pgdata, place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("mounted", [mounted_in_another_namespace, mounted_at_another_place])
def test_nothing_is_written_under_a_filesystem_that_is_mounted_elsewhere(
    make_set: MakeSet,
    binaries_of: BindirOf,
    monkeypatch: pytest.MonkeyPatch,
    mounted: Callable[[ProtectedSet], AbstractContextManager[None]],
) -> None:
    """It would go on with what it has in memory, and so would the mount that is made behind the rewind."""
    found = make_set(binaries_of(15), size=384 << 20)
    found.sql("create table ledger (n int primary key)")
    commit(found, 1)
    point = Target("write", found.durable())
    commit(found, 2)
    monkeypatch.setattr(attach, "BUSY_SECONDS", 1.0)
    with mounted(found), pytest.raises(PreconditionError, match=r"/dev/loop\d+ is still mounted at .* by pid \d+"):
        api.rewind(found.name, point, agree=agreed)
    assert ledger(found) == [1, 2]
    assert found.source().rewinds() == []
    monkeypatch.undo()
    rewind(found, point)
    assert ledger(found) == [1]
    found.amcheck()
