"""A clone is right, alone in its own world, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcdp import api, cloning, service
from pgcdp.capture import volumes
from pgcdp.capture.control import EngineClient
from pgcdp.errors import BugError, DamageError, PreconditionError, TargetError, UsageError
from pgcdp.fsio import write_json
from pgcdp.opening import open_source, scratch_place
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.proc import end
from pgcdp.records import Target
from pgcdp.recovery import clone as cloned
from pgcdp.recovery import clone_opening
from pgcdp.recovery.clone import Access
from pgcdp.store import lease
from pgcdp.store.image import read_state
from tests.fix_postgres import BindirOf, bad_lines, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet
from tests.results import keep_result
from tests.waiting import wait_until

SETTINGS = {"autovacuum": "off"}
pytestmark = pytest.mark.usefixtures("no_clone_stays")


def ask(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(sql.encode()).fetchall()


def traces(place: Path) -> list[str]:
    """What is left of a clone: processes, mounts, loop devices, files."""
    found = [f"process {pid} {name}" for pid, name in volumes.users_of(place)]
    found += [f"mount {mount.mountpoint}" for mount in volumes.mounts_below(place)]
    found += [f"loop {device}" for device in volumes.loops_over(place)]
    return found + ([str(place)] if place.exists() else [])


@pytest.fixture
def orders(make_set: MakeSet, pg_binaries: Binaries) -> ProtectedSet:
    """A set with 100 orders, all deleted in the newest transaction."""
    found = make_set(pg_binaries, size=384 << 20, settings=SETTINGS)
    fill(found)
    return found


def fill(found: ProtectedSet) -> None:
    with found.connect() as session:
        session.execute("create table orders as select n as id from generate_series(1, 100) n")
        api.cut(found.name)
        session.execute("delete from orders")


def told_by(store: Path) -> dict[Path, bytes]:
    """What a store says of itself; not whose it is, which the agent renews every few seconds."""
    return {file: file.read_bytes() for file in store.rglob("*.json") if file.name != lease.FILE}


def test_a_clone_before_the_mistake_accepts_writes_and_touches_nothing_else(orders: ProtectedSet) -> None:
    before = told_by(orders.config.store)
    announced: list[Any] = []

    def announce(told: dict[str, Any]) -> None:
        announced.append((told["recovery_point"], api.clones()["clones"]))

    target = Target("newest")
    made = api.clone(orders.name, target, before="delete from orders", name="saved", announce=announce)
    assert announced == [(made["recovery_point"], [])], "which point it is, is told before anything is made"
    other = api.clone(orders.name, Target("newest"))
    assert made["name"] == "saved"
    assert other["name"] == "main-1"
    assert made["last_transaction"]["xid"] < made["first_out"]["xid"]
    assert ask(made["dsn"], "select count(*) from orders") == [(100,)]
    assert ask(other["dsn"], "select count(*) from orders") == [(0,)]
    assert ask(made["dsn"], "insert into orders values (101) returning id") == [(101,)]
    assert ask(made["dsn"], "select count(*) from orders") == [(101,)]
    assert ask(other["dsn"], "select count(*) from orders") == [(0,)]
    assert orders.sql("select count(*) from orders") == [(0,)]
    assert told_by(orders.config.store) == before
    told = {each["name"]: each for each in api.clones()["clones"]}
    assert {name: each["state"] for name, each in told.items()} == {"saved": "running", "main-1": "running"}
    assert told["saved"]["written_bytes"] > 0
    assert told["saved"]["memory_bytes"] > 1 << 20
    place = scratch_place(orders.source())
    for name in told:
        api.destroy(name)
        assert traces(place / f"clone-{name}") == []
    assert not place.exists()
    assert api.clones() == {"clones": []}
    with pytest.raises(TargetError, match="there is no clone saved"):
        api.destroy("saved")


def test_a_clone_outlives_its_command_and_is_found_by_the_next(orders: ProtectedSet) -> None:
    def run(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-P", "-m", "pgcdp", *words, "--output", "json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    made = run("clone", "--before", "delete from orders", "--port", "0", "--trust-local")
    assert "host=127.0.0.1" in made["dsn"]
    assert ask(made["dsn"], "select count(*) from orders") == [(100,)]
    assert run("clones")["clones"][0]["dsn"] == made["dsn"]
    stepped = run("step", made["name"], "1", "--commit")
    assert stepped["dsn"] == made["dsn"], "its port stays"
    assert [each["xid"] for each in stepped["transactions_in"]] == [made["first_out"]["xid"]]
    assert ask(made["dsn"], "select count(*) from orders") == [(0,)]
    assert run("step", made["name"], "-1", "--commit")["transactions_out"] == stepped["transactions_in"]
    assert ask(made["dsn"], "select count(*) from orders") == [(100,)]
    run("destroy", made["name"])
    assert traces(cloned.PLACES / made["name"]) == []


def test_a_step_back_and_onward_is_the_same_as_a_clone_there(orders: ProtectedSet) -> None:
    """Each step drops what was written, and lands on the write that its number says."""
    with orders.connect() as session:
        for number in range(5):
            session.execute(f"insert into orders values ({1000 + number})".encode())
    orders.durable()
    made = api.clone(orders.name, Target("newest"))
    newest = made["recovery_point"]["write"]
    assert ask(made["dsn"], "insert into orders values (9) returning id") == [(9,)]
    back = api.step(made["name"], -3, commits=True)
    assert (len(back["transactions_out"]), back["transactions"]) == (3, {"in": 0, "out": 3})
    assert ask(made["dsn"], "select array_agg(id order by id) from orders") == [([1000, 1001],)]
    onward = api.step(made["name"], newest - back["recovery_point"]["write"] + 1)
    assert onward["recovery_point"]["write"] == newest
    assert onward["writes"][-1]["write"] <= newest
    assert [each["xid"] for each in onward["transactions_in"]] == [each["xid"] for each in back["transactions_out"]]
    assert ask(made["dsn"], "select array_agg(id order by id) from orders") == [([1000, 1001, 1002, 1003, 1004],)]
    with pytest.raises(TargetError, match="lie outside of the recovery window"):
        api.step(made["name"], newest)
    with pytest.raises(TargetError, match=r"commits? follows?"):
        api.step(made["name"], 1000, commits=True)
    with pytest.raises(UsageError, match="leads nowhere"):
        api.step(made["name"], 0)
    assert ask(made["dsn"], "select count(*) from orders") == [(5,)], "a step that cannot be changes nothing"
    api.destroy(made["name"])


def test_a_clone_lives_on_while_intervals_are_cut_under_it(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Production changes every page of the table each time; the clone reads them from where the moves have put them."""
    found = make_set(binaries_of(15), size=448 << 20, settings=SETTINGS)
    found.sql("create table t as select n as id, 0 as round, repeat('x', 500) as pad from generate_series(1, 20000) n")
    api.cut(found.name)
    made = api.clone(found.name, Target("newest"))
    control = EngineClient(scratch_place(found.source()) / f"clone-{made['name']}" / "control")
    everything = "select count(*), sum(id), sum(round), sum(length(pad)) from t"
    wanted = ask(made["dsn"], everything)
    for number in range(1, 7):
        found.sql(f"update t set round = {number}")
        boundary = int(api.cut(found.name)["number"])
        wait_until(lambda at=boundary: read_state(found.source().store).boundary >= at, what="the image moves")  # type: ignore[misc]
        assert ask(made["dsn"], everything) == wanted
        assert ask(made["dsn"], f"update t set pad = repeat('y', 500) where id = {number} returning round") == [(0,)]
    assert ask(found.dsn(), "select min(round) from t") == [(6,)]
    status = control.request("status")
    assert (status["reloads"], status["error_count"]) == (6, 0)
    assert ask(made["dsn"], "select count(*) from t where pad like 'y%'") == [(6,)]
    stepped = api.step(made["name"], -1)
    assert ask(stepped["dsn"], everything) == wanted
    api.destroy(made["name"])


def test_production_that_is_stopped_stays_as_it_is_byte_for_byte(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    api.down(found.name)
    backing = found.config.volumes[0].backing
    before = backing.stat().st_mtime_ns, subprocess.run(["sha256sum", backing], capture_output=True, check=True).stdout
    made = api.clone(found.name, Target("newest"))
    assert ask(made["dsn"], "insert into orders values (1) returning id") == [(1,)]
    api.destroy(made["name"])
    after = backing.stat().st_mtime_ns, subprocess.run(["sha256sum", backing], capture_output=True, check=True).stdout
    assert after == before


def test_a_clone_has_the_settings_of_its_point(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """Not those of now, and not Postgres's defaults: what a date means is for them to say."""
    then = {"TimeZone": "Pacific/Auckland", "DateStyle": "SQL, DMY", "shop.tenant": "north", "search_path": "shop"}
    found = make_set(pg_binaries, size=384 << 20, settings={**SETTINGS, **then})
    found.sql("create schema shop; create table shop.days as select date '2026-02-01' as day")
    found.durable()
    early = api.cut(found.name)["number"]
    with (found.pgdata / "postgresql.conf").open("a") as stream:
        stream.write("TimeZone = 'UTC'\nDateStyle = 'ISO, MDY'\nshop.tenant = 'south'\n")
    found.sql("select pg_reload_conf()")

    def zone_kept() -> str:
        cut = Target("boundary", api.cut(found.name)["number"])
        source = found.source()
        kept = source.settings(source.resolve(cut))
        assert kept is not None
        return str(next(row["setting"] for row in kept["settings"] if row["name"] == "TimeZone"))

    wait_until(lambda: zone_kept() == "UTC", timeout=15, what="an interval has the new settings")
    late = api.cut(found.name)["number"]
    question = """
        select day::text, date '03/02/2026' - day, current_setting('TimeZone'), current_setting('shop.tenant') from days
    """
    answers = {early: ("01/02/2026", 2, "Pacific/Auckland", "north"), late: ("2026-02-01", 29, "UTC", "south")}
    for boundary, answer in answers.items():
        made = api.clone(found.name, Target("boundary", boundary))
        assert ask(made["dsn"], question) == [answer]
        assert made["recovery"]["defaults"] == []
        api.destroy(made["name"])


def test_a_strict_umask_keeps_nobody_out(make_set: MakeSet, binaries_of: BindirOf, tmp_path: Path) -> None:
    """What Postgres's own user must pass through is made so, on a machine where root's files are root's alone."""
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    place = found.root / "restored"
    for words in (
        ["clone", "--name", "strict"],
        ["verify"],
        ["salvage", "--table", "orders", "--file", str(tmp_path / "orders.sql")],
        ["restore", "--to-directory", str(place)],
        ["destroy", "strict"],
    ):
        command = [sys.executable, "-P", "-m", "pgcdp", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, umask=0o077)
        assert done.returncode == 0, (words, done.stderr)


def test_names_and_ports_that_are_taken_change_nothing(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    made = api.clone(found.name, Target("newest"), name="one", access=Access(port=0, trust=True))
    port = int(next(word for word in made["dsn"].split() if word.startswith("port="))[5:])
    with pytest.raises(PreconditionError, match="a clone one exists already"):
        api.clone(found.name, Target("newest"), name="one")
    with pytest.raises(PreconditionError, match=f"port {port} of 127.0.0.1 cannot be used"):
        api.clone(found.name, Target("newest"), name="two", access=Access(port=port))
    with pytest.raises(UsageError, match="cannot be the name of a clone"):
        api.clone(found.name, Target("newest"), name="../one")
    assert ask(made["dsn"], "select count(*) from orders") == [(0,)]
    assert [each["name"] for each in api.clones()["clones"]] == ["one"]
    api.destroy("one")


def test_a_clone_that_nobody_was_told_of_is_not_left(
    make_set: MakeSet, binaries_of: BindirOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens while what lies on both sides of its point is read, and that may fail when it runs already."""
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    source = open_source(found.name, None)
    place = scratch_place(source) / "clone-lost"

    def fails(*_: object) -> None:
        wait_until(lambda: (place / "postgres").exists(), what="the clone opens meanwhile")
        raise BugError("what lies on both sides")

    monkeypatch.setattr(cloning, "between", fails)
    with pytest.raises(BugError, match="on both sides"):
        api.clone(found.name, Target("newest"), name="lost")
    assert api.clones()["clones"] == []
    assert traces(place) == []


def test_a_port_that_leads_nowhere_is_no_clone(
    make_set: MakeSet, binaries_of: BindirOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The door stands open before somebody stands behind it: whoever connects then would wait for ever."""
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    place = scratch_place(found.source())
    for does, said in (("sys.exit('cannot forward: so it is')", "cannot forward: so it is"), ("", "it said nothing")):
        script = tmp_path / "forward.py"
        script.write_text(f"import sys\n{does}\n")
        monkeypatch.setattr(clone_opening, "FORWARDER", script)
        with pytest.raises(PreconditionError, match=f"nobody answers at port .*: {said}"):
            api.clone(found.name, Target("newest"), access=Access(port=0))
        assert traces(place) == []


def rule(found: ProtectedSet, *lines: str) -> None:
    """Have these lines in pg_hba.conf, the first one for the socket, and in the newest interval."""
    (found.pgdata / "pg_hba.conf").write_text("\n".join(lines) + "\n")
    found.sql("select pg_reload_conf()")
    known = "select count(*) from pg_hba_file_rules where error is null"
    wait_until(lambda: found.sql(known) == [(len(lines),)], what="the rules")
    service.stop(found.config)  # the next agent asks for the settings at once
    api.up(found.name)
    found.wait_following()
    api.cut(found.name)
    wait_until(lambda: len(found.source().newest_settings()["hba"]) == len(lines) - 1, what="the agent sees the rules")


def test_who_must_encrypt_in_production_is_let_in_by_its_clone(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A clone has no TLS. A password is enough where it is in production, and not where a certificate is asked for."""
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    for role in ("app", "certified"):
        found.sql(f"create role {role} login password 'secret'")
    words = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x -keyout server.key -out server.crt"
    subprocess.run(words.split(), check=True, capture_output=True, cwd=found.pgdata)
    os.chown(found.pgdata / "server.key", postgres_user().uid, -1)
    found.sql("alter system set ssl = on")
    rule(
        found, "local all all trust",
        "hostnossl all all 0.0.0.0/0 reject",
        "hostssl all certified 0.0.0.0/0 md5 clientcert=verify-ca",
        "hostssl all app 0.0.0.0/0 md5",
    )  # fmt: skip
    made = api.clone(found.name, Target("newest"), access=Access(port=0))
    dsn = made["dsn"].replace("user=postgres", "user=app")
    assert ask(f"{dsn} password=secret", "select 1") == [(1,)]
    with pytest.raises(psycopg.OperationalError, match="password"):
        ask(dsn, "select 1")
    for user in ("certified", "postgres"):
        with pytest.raises(psycopg.OperationalError, match=r"rejects connection|no pg_hba.conf entry"):
            ask(f"{dsn.replace('user=app', f'user={user}')} password=secret", "select 1")
    api.destroy(made["name"])


def test_productions_own_rules_hold_at_the_port(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A password that production asks for is asked for by its clone; a method that asks outside lets nobody in."""
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    found.sql("create role app login password 'secret'")
    found.sql("create role other login")
    rule(
        found, "local all all trust",
        "host all other 127.0.0.1/32 ldap ldapserver=x ldapprefix=y",
        "host all app 0.0.0.0/0 md5",
    )  # fmt: skip
    made = api.clone(found.name, Target("newest"), access=Access(port=0))
    dsn = made["dsn"].replace("user=postgres", "user=app")
    with pytest.raises(psycopg.OperationalError, match="password"):
        ask(dsn, "select 1")
    assert ask(f"{dsn} password=secret", "select 1") == [(1,)]
    for user in ("other", "postgres"):
        with pytest.raises(psycopg.OperationalError, match=r"rejects connection|no pg_hba.conf entry"):
            ask(made["dsn"].replace("user=postgres", f"user={user}"), "select 1")
    api.destroy(made["name"])


def test_what_a_crash_of_the_machine_leaves_is_cleared_by_up(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    made = api.clone(found.name, Target("newest"), access=Access(port=0))
    place = scratch_place(found.source()) / f"clone-{made['name']}"
    record = cloned.Clone.load(place)
    assert traces(place)
    said = json.loads((place / "clone.json").read_text())
    del said["checksum"]
    write_json(place / "clone.json", {**said, "boot_id": "another"})  # as after a reboot
    assert [each["state"] for each in api.clones()["clones"]] == ["dead"]
    api.up(found.name)
    wait_until(lambda: traces(place) == [], what="its forwarder ends with its Postgres")
    for pid, start in record.processes:
        assert not any(pid == each for each, _ in volumes.users_of(Path("/proc"))), start
    again = api.clone(found.name, Target("newest"), name=made["name"])
    view = EngineClient(place / "control").request("status")["pid"]
    end(int(view))
    assert [each["state"] for each in api.clones()["clones"]] == ["dead"]
    api.destroy(again["name"])
    assert traces(place) == []


def test_a_running_clone_whose_record_is_damaged_can_be_taken_away(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Nothing but its directory tells what is its own."""
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    made = api.clone(found.name, Target("newest"), access=Access(port=0))
    place = scratch_place(found.source()) / f"clone-{made['name']}"
    record = place / "clone.json"
    os.truncate(record, record.stat().st_size // 2)
    (listed,) = api.clones()["clones"]
    assert (listed["name"], listed["state"]) == (made["name"], "damaged")
    assert str(record) in listed["problem"]
    assert listed["memory_bytes"] > 1 << 20
    with pytest.raises(DamageError, match="is no JSON"):
        api.step(made["name"], -1)
    api.destroy(made["name"])
    wait_until(lambda: traces(place) == [], what="its forwarder ends with its Postgres")
    assert api.clones() == {"clones": []}


def test_a_clone_whose_set_is_gone_says_how_to_go_on(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The journal went with the set: only the store is left to open something from."""
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    made = api.clone(found.name, Target("newest"), before="delete from orders")
    store = found.config.store
    api.unprotect(found.name)
    cluster.stop(found.pgdata)
    with pytest.raises(
        PreconditionError, match=f"set main, which clone {made['name']} was opened from, is not"
    ) as told:
        api.step(made["name"], -1)
    words = str(told.value.hint).partition(" opens")[0].split()
    assert words == ["pgcdp", "clone", "--store", str(store), "--target-write", str(made["recovery_point"]["write"])]
    assert ask(made["dsn"], "select count(*) from orders") == [(100,)], "it is as it was"
    done = subprocess.run([sys.executable, "-P", "-m", *words], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    for name in ("main-1", "main-2"):
        api.destroy(name)


def test_slots_of_the_image_do_not_fill_a_clone_with_wal(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """Who reads them is outside, and a clone may live long. Until it has written so much, they are as in production."""
    found = make_set(pg_binaries, size=512 << 20, settings={**SETTINGS, "wal_level": "logical"})
    found.sql("select pg_create_physical_replication_slot('standby', true)")
    found.sql("select pg_create_logical_replication_slot('subscriber', 'pgoutput')")
    found.durable()
    made = api.clone(found.name, Target("newest"))
    log = scratch_place(found.source()) / f"clone-{made['name']}" / "postgres" / "postgres.log"
    slots = "select slot_name, wal_status from pg_replication_slots order by 1"
    assert ask(made["dsn"], slots) == [("standby", "reserved"), ("subscriber", "reserved")]
    with psycopg.connect(made["dsn"], autocommit=True) as session:
        for _ in range(8):
            session.execute("select pg_logical_emit_message(true, '', ''), pg_switch_wal()")
        session.execute("checkpoint")
        kept = session.execute(
            "select count(*) from pg_ls_waldir() where name < pg_walfile_name(pg_current_wal_lsn() - 5 * (16 << 20))"
        ).fetchall()
    assert kept == [(0,)]
    assert ask(made["dsn"], slots) == [("standby", "lost"), ("subscriber", "lost")]
    assert bad_lines(log.read_text()) == []
    api.destroy(made["name"])


def test_one_whose_time_is_over_goes_by_itself(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    made = api.clone(found.name, Target("newest"), ttl=1.0)
    place = scratch_place(found.source()) / f"clone-{made['name']}"
    wait_until(lambda: not place.exists(), timeout=60, what="the agent destroys it")
    assert traces(place) == []


def test_a_read_only_clone_refuses_writes(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    fill(found)
    made = api.clone(None, Target("newest"), store=found.config.store, access=Access(read_only=True))
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        ask(made["dsn"], "insert into orders values (1) returning id")
    assert made["name"] == "main-1"
    api.destroy(made["name"])


def many(found: ProtectedSet, count: int) -> dict[str, Any]:
    """`count` clones at as many commits at once: each right, each written to without touching another or the store."""
    with found.connect() as session:
        session.execute("create table steps (n int)")
        for number in range(count):
            session.execute(f"insert into steps values ({number})".encode())
            if number % 3 == 0:
                api.cut(found.name)
    commits = [
        each["xid"] for each in api.log(found.name, table="steps", operation="insert", limit=count)["transactions"]
    ]
    stored = {file: file.stat().st_mtime_ns for file in found.store.glob("intervals/**/*") if file.is_file()}
    made = [api.clone(found.name, Target("xid", xid)) for xid in reversed(commits)]
    for number, each in enumerate(made):
        assert ask(each["dsn"], "select array_agg(n order by n) from steps") == [(list(range(number + 1)),)]
        assert ask(each["dsn"], f"delete from steps where n < {number} returning 1") == [(1,)] * number
    for number, each in enumerate(made):
        assert ask(each["dsn"], "select array_agg(n) from steps") == [([number],)]
    assert found.sql("select count(*) from steps") == [(count,)]
    listed = api.clones()["clones"]
    for each in made:
        api.destroy(each["name"])
    assert {file: file.stat().st_mtime_ns for file in stored} == stored
    memory = [each["memory_bytes"] for each in listed]
    return {
        "clones": count,
        "memory_mib_each": round(sum(memory) / count / (1 << 20), 1),
        "open_seconds": [each["seconds"] for each in made],
    }


def test_clones_side_by_side_at_different_points(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    assert many(found, 4)["memory_mib_each"] > 1


@pytest.mark.soak
def test_twenty_clones_side_by_side(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, settings=SETTINGS)
    told = many(found, 20)
    keep_result("twenty-clones", told)
