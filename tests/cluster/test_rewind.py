"""Production rewound in place: right where it went to, and every time brought back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcdp import api
from pgcdp.capture import attach
from pgcdp.errors import PreconditionError, TargetError, UsageError
from pgcdp.fsio import free_space
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Target
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet, first_difference
from tests.waiting import wait_until


def agreed(resolved: dict[str, Any]) -> None:
    """Yes to everything."""


def rewind(found: ProtectedSet, target: Target) -> dict[str, Any]:
    told: dict[str, Any] = api.rewind(found.name, target, agree=agreed)
    assert told["verified"]
    return told


def undo(found: ProtectedSet, told: dict[str, Any]) -> dict[str, Any]:
    return rewind(found, Target("name", name=told["undo"]))


def ledger(found: ProtectedSet) -> list[int]:
    return [row[0] for row in found.sql("select n from ledger order by n")]


def timeline(found: ProtectedSet) -> int:
    return cluster.read_control(found.pgdata).timeline


def test_a_restore_over_production_itself_is_told_from_any_full_directory(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """The hint for that one, to remove it first, would be the end of production."""
    found = make_set(binaries_of(15))
    (found.root / "link").symlink_to(found.pgdata)
    for place in (found.pgdata, found.root / "link"):
        with pytest.raises(UsageError, match=rf"{place} is the data directory of set {found.name} itself") as told:
            api.restore(found.name, Target("newest"), to_directory=place)
        assert "--in-place" in str(told.value.hint)
        assert "remove" not in str(told.value.hint)
    with pytest.raises(UsageError, match="is not empty"):
        api.restore(found.name, Target("newest"), to_directory=found.store)


REFUSING = "if test -f {0}/%f; then echo %f >> {0}/refused; exit 1; fi; cp %p {0}/.%f && mv {0}/.%f {0}/%f"
"""An archive_command that never overwrites, and notes what it refused."""


def wait_archived(found: ProtectedSet, archive: Path) -> None:
    """Close a segment and wait until it is in the archive."""
    found.sql("select pg_logical_emit_message(false, 'test', 'something to close')")
    name = str(found.sql("select pg_walfile_name(pg_switch_wal())")[0][0])
    wait_until(lambda: (archive / name).exists(), timeout=60, what=f"{name} in the archive")


@pytest.mark.every_variant  # each version numbers timelines, and archives, by code of its own
def test_ledger_timelines_and_archive_through_rewind_undo_elsewhere_undo(
    make_set: MakeSet, pg_binaries: Binaries
) -> None:
    found = make_set(pg_binaries, protect=False)
    archive = found.root / "archive"
    archive.mkdir()
    os.chown(archive, postgres_user().uid, postgres_user().gid)
    found.protect(
        size=512 << 20, journal_limit=2 << 30,
        settings={"archive_mode": "on", "archive_command": REFUSING.format(archive), "max_wal_size": "64MB"},
    )  # fmt: skip
    found.sql("create table ledger (n int primary key)")
    points: dict[int, int] = {}
    for last in range(100, 600, 100):
        found.sql(f"insert into ledger select generate_series({last - 99}, {last})")
        points[last] = found.durable()
        wait_archived(found, archive)
        if last in (200, 400):
            api.cut(found.name)
    seen = [timeline(found)]

    def check(last: int) -> None:
        assert ledger(found) == list(range(1, last + 1))
        assert timeline(found) > max(seen)
        seen.append(timeline(found))
        wait_archived(found, archive)
        assert not (archive / "refused").exists(), (archive / "refused").read_text()
        assert (archive / f"{seen[-1]:08X}.history").exists()

    first = rewind(found, Target("write", points[200]))
    check(200)
    found.sql("insert into ledger select generate_series(201, 250)")
    second = undo(found, first)
    check(500)
    third = rewind(found, Target("write", points[300]))
    check(300)
    undo(found, third)
    check(500)
    undo(found, second)
    check(250)
    found.amcheck()
    assert seen == [1, 2, 3, 4, 5, 6]


def test_what_was_before_a_rewind_is_listed_once_however_often_it_was_rewound(
    make_set: MakeSet, pg_binaries: Binaries
) -> None:
    """A new timeline's first segment is a copy of the old one's, with all that opened timelines in it before."""
    found = make_set(pg_binaries, size=384 << 20, settings={"autovacuum": "off"})

    def changed(number: int) -> list[int]:
        """A table of ten rows, set to 0 and deleted: the ids of the three transactions."""
        xids = []
        with found.connect() as session:
            for sql in ("create table {} as select generate_series(1, 10) a", "update {} set a = 0", "delete from {}"):
                session.execute(f"begin; {sql.format(f't{number}')}".encode())
                xids += [int(session.execute("select pg_current_xact_id()::text").fetchall()[0][0])]
                session.execute("commit")
        return xids

    def check(*tables: tuple[int, list[int]]) -> None:
        for number, xids in tables:
            listed = api.log(found.name, table=f"t{number}")["transactions"]
            assert [each["xid"] for each in listed] == xids[::-1]
            resolved = api.resolve(found.name, Target("xid", xids[1], exclusive=True))
            assert [resolved[side]["xid"] for side in ("last_in", "first_out")] == xids[:2]
            name = api.clone(found.name, Target("xid", xids[1], exclusive=True))
            with psycopg.connect(name["dsn"]) as connection:
                assert connection.execute(f"select sum(a) from t{number}".encode()).fetchall() == [(55,)]
            api.destroy(name["name"])

    one = changed(1)
    first = rewind(found, Target("xid", one[1]))
    check((1, one[:2]))
    two = changed(2)
    second = rewind(found, Target("xid", two[1]))
    check((1, one[:2]), (2, two[:2]))
    undo(found, second)
    check((1, one[:2]), (2, two))
    api.cut(found.name)
    check((1, one[:2]), (2, two))
    undo(found, first)
    check((1, one))


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_the_volume_is_the_target_byte_for_byte(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    """At the end record the writes leave what `restore --to-image` makes of the target, in every block."""
    found = make_set(binaries_of(15), fs=fs, size=352 << 20, settings={"max_wal_size": "64MB"})
    found.pgbench("-i", "-s", "2", "-q")
    xids = []
    points: list[Target] = []
    for number in range(3):
        found.pgbench("-c", "4", "-t", "100", "-n")
        xids.append(int(found.sql("insert into pgbench_history values (1) returning pg_current_xact_id()::text")[0][0]))
        found.pgbench("-c", "4", "-t", "100", "-n")
        points.append(Target("write", found.durable()))
        if number < 2:
            points.append(Target("boundary", int(api.cut(found.name)["number"])))
    for target in (points[1], points[0], Target("xid", xids[1], exclusive=True), points[-1]):
        point = found.source().resolve(target)
        (wanted,) = found.restored(target)
        rewind(found, target)
        done = found.source().rewinds()[-1]
        assert (done.to_write, done.to_lsn) == (point.write, point.lsn)
        assert done.end is not None
        (image,) = found.restored(Target("write", done.end))
        assert first_difference(image, wanted) is None
        found.amcheck()
        found.pgbench("-c", "2", "-t", "50", "-n")
        undo_to = found.source().resolve(Target("write", done.begin - 1))
        assert undo_to.write == done.begin - 1
        rewind(found, Target("write", done.begin - 1))
        for each in (wanted, image):
            each.unlink()


def test_rewind_and_undo(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20)
    found.sql("create table ledger (n int primary key)")
    found.sql("insert into ledger select generate_series(1, 100)")
    point = found.durable()
    found.sql("insert into ledger select generate_series(101, 200)")
    api.cut(found.name)
    found.sql("drop table ledger")
    told = rewind(found, Target("write", point))
    assert ledger(found) == list(range(1, 101))
    assert timeline(found) == 2
    back = undo(found, told)
    assert found.sql("select to_regclass('ledger')") == [(None,)]
    assert timeline(found) == 3
    undo(found, back)
    assert ledger(found) == list(range(1, 101))
    assert timeline(found) == 4
    with pytest.raises(TargetError, match="inside a rewind in place"):
        found.source().resolve(Target("write", found.source().rewinds()[0].begin))


def test_transactions_belong_to_a_branch(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The same xids come again behind a rewind; those that it left are found when they are asked for."""
    found = make_set(binaries_of(15), size=384 << 20)

    def commit(word: str) -> int:
        with found.connect() as session, session.transaction():
            session.execute("insert into words values (%s)", (word,))
            row = session.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row is not None
        return int(row[0])

    def words() -> list[str]:
        return [row[0] for row in found.sql("select word from words order by word")]

    def listed() -> list[int]:
        told = api.log(found.name, table="words", operation="insert", limit=None)["transactions"]
        return [each["xid"] for each in told]

    found.sql("create table words (word text)")
    first = commit("kept")
    api.cut(found.name)
    left = [commit("left 1"), commit("left 2"), commit("left 3")]
    found.sql("update words set word = word")
    api.cut(found.name)
    found.sql("create table only_there as select 1 as id")
    told = rewind(found, Target("xid", first))
    assert (told["lost"]["transactions"], told["out"], told["first_out"]["xid"]) == (5, 5, left[0])
    lost = {each["name"]: each["inserted"] for each in told["lost"]["tables"] if each["schema"] == "public"}
    assert lost == {"words": 3, "only_there": 1}
    assert words() == ["kept"]
    assert listed() == [first]
    again = commit("new 1")
    while again < left[1]:
        again = commit("new 2")
    assert again == left[1], "the same xid on another branch"
    assert listed()[0] == again
    end = found.source().rewinds()[0].end
    assert end is not None
    assert found.source().resolve(Target("xid", again)).write > end
    with pytest.raises(TargetError, match=f"transaction {left[2]} is not on the current branch") as caught:
        found.source().resolve(Target("xid", left[2]))
    assert "--branch 1" in str(caught.value.hint)
    there = api.log(found.name, table="words", operation="insert", branch=1)["transactions"]
    assert [each["xid"] for each in there] == [*reversed(left), first]
    assert len(api.find(found.name, "insert into words values ('x')", branch=1)["transactions"]) == 4
    words_before = [
        "restore",
        found.name,
        "--before",
        "update words set word = ''",
        "--to-image",
        str(found.root / "i"),
    ]
    code, _, said = run(*words_before)
    assert (code, "no transaction did" in said) == (3, True), said
    code, _, said = run(*words_before, "--branch", "1")
    assert code == 0, said
    assert f"last transaction in: xid {left[2]}," in said
    with pytest.raises(TargetError, match="transactions did") as several:
        api.resolve(found.name, Target("newest", branch=1), before="insert into words values ('x')")
    assert str(several.value.hint).endswith("--exclusive --branch 1")
    before = "update words set word = ''"
    assert api.find(found.name, before)["note"] == "timeline 1, which a rewind has left, has it: --branch 1"
    assert api.find(found.name, before, branch=1)["note"] is None
    with pytest.raises(TargetError, match="no transaction did") as elsewhere:
        api.resolve(found.name, Target("newest"), before=before)
    assert str(elsewhere.value.hint).endswith("has it: --branch 1")
    assert "has it" not in str(api.find(found.name, "delete from words")["note"])
    with pytest.raises(TargetError, match="no table only_there is known") as unknown:
        api.find(found.name, "insert into only_there")
    assert str(unknown.value.hint).endswith("has it: --branch 1")
    with pytest.raises(TargetError, match="no branch with timeline 9"):
        found.source().resolve(Target("xid", left[2], branch=9))
    back = rewind(found, Target("xid", left[1], branch=1))
    assert words() == ["kept", "left 1", "left 2"]
    assert back["last_in"]["xid"] == left[1]
    assert back["lost"]["transactions"] >= 2
    assert listed() == [left[1], left[0], first]
    undo(found, told)
    assert words() == ["kept", "left 1", "left 2", "left 3"]
    assert listed() == [left[2], left[1], left[0], first]


@pytest.mark.usefixtures("no_clone_stays")
def test_a_clone_steps_on_a_branch_that_was_left_and_over_the_rewind(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """What it tells is what the clone then has and what it has no more, whatever branch that lies on."""
    found = make_set(binaries_of(15), size=384 << 20)

    def commit(word: str) -> int:
        found.sql(f"insert into words values ('{word}')")
        return int(api.log(found.name, table="words", limit=1)["transactions"][0]["xid"])

    def xids(told: dict[str, Any]) -> tuple[list[int], list[int]]:
        came, went = ([each["xid"] for each in told[f"transactions_{way}"]] for way in ("in", "out"))
        assert told["transactions"] == {"in": len(came), "out": len(went)}
        return came, went

    def words() -> list[str]:
        with psycopg.connect(made["dsn"], autocommit=True) as session:
            return [row[0] for row in session.execute("select word from words").fetchall()]

    found.sql("create table words (word text)")
    first = commit("kept")
    api.cut(found.name)
    left = [commit("left 1"), commit("left 2")]
    made = api.clone(found.name, Target("newest"))
    assert words() == ["kept", "left 1", "left 2"]
    at = made["recovery_point"]["write"]
    rewind(found, Target("xid", first))
    again = [commit("new 1"), commit("new 2"), commit("new 3")]
    newest = found.durable()

    back = api.step(made["name"], -1, commits=True)
    assert (xids(back), back["rewinds_passed"], words()) == (([], left[1:]), 0, ["kept", "left 1"])
    with pytest.raises(TargetError, match="only 1 commit follows this point"):
        api.step(made["name"], 2, commits=True)
    onward = api.step(made["name"], 1, commits=True)
    assert (xids(onward), onward["rewinds_passed"], words()) == ((left[1:], []), 0, ["kept", "left 1", "left 2"])

    here = onward["recovery_point"]
    over = api.step(made["name"], newest - here["write"] + (here["lsn"] is not None))
    came, went = xids(over)
    assert (went, came[-3:], over["rewinds_passed"]) == (left, again, 1)
    assert words() == ["kept", "new 1", "new 2", "new 3"]
    there_again = api.step(made["name"], at - newest)
    assert (xids(there_again), there_again["rewinds_passed"]) == ((left, came), 1)
    assert words() == ["kept", "left 1", "left 2"]
    api.destroy(made["name"])


def run(*words: str) -> tuple[int, str, str]:
    """`pgcdp` with these words, without a terminal: exit code, output, errors."""
    code = "import sys; from pgcdp.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd="/", check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_point_that_fails_its_checks_is_said_and_runs_all_the_same(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """An index over a function that has changed since it was built: amcheck finds rows that are not in it."""
    found = make_set(binaries_of(15), size=384 << 20)
    found.sql("create table ledger (n int primary key)")
    found.sql("insert into ledger select generate_series(1, 7)")
    found.sql("create function turned(int) returns int immutable language sql as 'select $1'")
    found.sql("create index on ledger (turned(n))")
    found.sql("create or replace function turned(int) returns int immutable language sql as 'select -$1'")
    point = found.durable()
    found.sql("insert into ledger select generate_series(8, 9)")
    code, told, said = run(
        "restore", found.name, "--target-write", str(point), "--in-place", "--yes", "--output", "json"
    )
    assert code == 4, said
    assert json.loads(told)["verified"] is False
    assert ledger(found) == list(range(1, 8))
    assert not found.config.paths.rewind_state.exists()


def test_what_it_costs_is_shown_and_asked(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings={"wal_level": "logical"})
    found.sql("create table ledger (n int primary key)")
    point = found.durable()
    found.sql("insert into ledger select generate_series(1, 7)")
    found.sql("select pg_create_logical_replication_slot('feed', 'test_decoding')")
    words = ["restore", found.name, "--target-write", str(point), "--in-place"]
    begun = found.sql("select pg_postmaster_start_time()")
    code, _, said = run(*words)
    assert code == 2
    assert "--yes" in said
    assert "lost in postgres: public.ledger: 7 inserted" in said
    assert "lost: 1 transaction, committed" in said
    assert "logical slot feed has to be made anew: in postgres: SELECT pg_drop_replication_slot(slot_name)" in said
    assert ledger(found) == list(range(1, 8)), "nothing was done"
    assert found.source().rewinds() == []
    assert found.sql("select pg_postmaster_start_time()") == begun
    code, told, said = run(*words, "--yes")
    assert code == 0, said
    assert ledger(found) == []
    undo_line = told.splitlines()[-1]
    assert undo_line.startswith(f"to undo: pgcdp restore {found.name} --in-place --target-name before-rewind-")
    assert run(*undo_line.removeprefix("to undo: pgcdp ").split(), "--yes")[0] == 0
    assert ledger(found) == list(range(1, 8))
    attach.stop_cluster(found.config)
    code, _, said = run(*words)
    assert code == 2
    assert "it is not known who follows it" in said, "nobody is not the same"


WITHOUT_START = (r"configuration file .* contains errors", r"syntax error")
"""What Postgres logs where it does not start."""


def point_without_start(found: ProtectedSet) -> int:
    """A write behind which Postgres does not start: its settings are wrong there."""
    settings = found.pgdata / "postgresql.conf"
    right = settings.read_bytes()
    with settings.open("ab") as file:
        file.write(b"shared_buffers = half of it\n")
        file.flush()
        os.fsync(file.fileno())
    point = found.durable()
    settings.write_bytes(right)
    return point


def test_a_target_on_which_postgres_does_not_start_can_be_left_again(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=WITHOUT_START)
    found.sql("create table ledger (n int primary key)")
    point = point_without_start(found)
    found.sql("insert into ledger select generate_series(1, 7)")
    with pytest.raises(PreconditionError, match="did not come up as it was at the recovery point") as caught:
        rewind(found, Target("write", point))
    (mark,) = re.findall(r"--target-name (before-rewind-\d+)", str(caught.value.hint))
    assert "a rewind in place" in api.status(found.name)["error"]
    with pytest.raises(PreconditionError, match="did not come up"):
        found.up()
    for refused in (api.down, api.unprotect):
        with pytest.raises(PreconditionError, match="a rewind in place"):
            refused(found.name)
    rewind(found, Target("name", name=mark))
    assert ledger(found) == list(range(1, 8))
    assert api.status(found.name)["error"] is None


def test_a_rewind_in_place_of_another_looks_for_room_too(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Else production, down already, would be down until somebody has made room, with two rewinds half done."""
    found = make_set(binaries_of(15), protect=False, allowed=WITHOUT_START)
    found.store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(found.store)], check=True)
    try:
        found.protect(size=384 << 20, settings={}, journal_limit=2 << 30)
        found.sql("create table ledger (n int primary key)")
        found.sql("insert into ledger select generate_series(1, 7)")
        early = found.durable()
        point = point_without_start(found)
        with pytest.raises(PreconditionError, match="did not come up"):
            rewind(found, Target("write", point))
        left = found.config.paths.rewind_state.read_bytes()
        filler = found.store / "filler"
        filler.write_bytes(bytes(free_space(found.store) - (100 << 20)))
        with pytest.raises(PreconditionError, match=f"the store at {found.store} has .* the rewind may need"):
            rewind(found, Target("write", early))
        assert found.config.paths.rewind_state.read_bytes() == left, "nothing was begun"
        filler.unlink()
        rewind(found, Target("write", early))
        assert ledger(found) == list(range(1, 8))
        api.down(found.name)
    finally:
        subprocess.run(["umount", "--lazy", str(found.store)], check=True)


@pytest.mark.parametrize("where", ["store", "journal"])
def test_without_room_for_what_is_written_back_nothing_is_begun(
    make_set: MakeSet, binaries_of: BindirOf, where: str
) -> None:
    """Production would be down until somebody has made room."""
    full = "journal: cannot make a segment: No space left on device"  # it makes them ahead
    found = make_set(binaries_of(15), protect=False, allowed=[full] if where == "journal" else [])
    small = found.store if where == "store" else found.root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(small)], check=True)
    journal: dict[str, Any] = {"journal_limit": 2 << 30}
    if where == "journal":
        journal = {"journal": small / "main", "journal_limit": 384 << 20, "segment_size": 8 << 20}
    try:
        found.protect(size=384 << 20, settings={}, **journal)
        if where == "journal":  # 60 MiB are left to it, enough for what comes, and less than a rewind keeps to spare
            (small / "else").write_bytes(bytes(340 << 20))
        point = found.source().base().write
        rows = 120_000 if where == "store" else 10_000
        found.sql(f"create table ledger as select n, repeat('x', 1000) from generate_series(1, {rows}) n")
        found.sql("checkpoint")
        with pytest.raises(PreconditionError, match="the rewind may need") as caught:
            rewind(found, Target("write", point))
        assert f"the {where} at {small}" in caught.value.message
        assert found.sql("select count(*) from ledger") == [(rows,)]
        assert not found.config.paths.rewind_state.exists()
        assert found.source().rewinds() == []
        (small / "else").unlink(missing_ok=True)
        api.down(found.name)
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
