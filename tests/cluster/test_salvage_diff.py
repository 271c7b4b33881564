"""`salvage --diff --apply` gives a live table back what it lost, and never takes or bends what came since."""

from __future__ import annotations

from typing import Any

import pytest

from pgcdp import api
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres import session
from pgcdp.records import Target
from pgcdp.recovery import salvage as salvaging
from pgcdp.recovery.salvage import Wanted
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet

Told = dict[str, Any]


@pytest.fixture
def then(make_set: MakeSet, binaries_of: BindirOf) -> tuple[ProtectedSet, Target]:
    """Tables as they were at a point, before anything happened to them."""
    found = make_set(binaries_of(15), allowed=[r'insert or update on table "child"'])
    with found.connect() as live:
        live.execute("create table o (id int primary key, status text)")
        live.execute(
            "insert into o select n, case when n <= 90 then 'paid' else 'void' end from generate_series(1, 100) n"
        )
        live.execute("create table trg (id int primary key, v text, upd text)")
        live.execute("insert into trg select n, 'a', 'old' from generate_series(1, 10) n")
        live.execute("""create function touch() returns trigger language plpgsql as
            $$ begin new.upd := 'touched'; return new; end $$""")
        live.execute("create trigger touching before update on trg for each row execute function touch()")
        live.execute("create table one (id int generated always as identity, k uuid primary key, v text)")
        live.execute("insert into one (k, v) select gen_random_uuid(), 'x' from generate_series(1, 5)")
        live.execute("create table parent (id int primary key)")
        live.execute("create table child (id int primary key, pid int references parent on delete cascade)")
        live.execute("insert into parent select generate_series(1, 10); insert into child select n, n from parent p(n)")
        live.execute("create table seats (id int primary key, seat text unique, next int references seats)")
        live.execute("insert into seats select n, 'seat ' || n, nullif(10 - n, 0) from generate_series(1, 10) n")
        live.execute("create table tickets (id int primary key, seat int references seats)")
        live.execute("insert into tickets select n, n from generate_series(1, 8) n")
        live.execute("create table heir (id int primary key); create table heirs_own (more int) inherits (heir)")
    return found, Target("write", found.durable())


def salvage(then: tuple[ProtectedSet, Target], *tables: str, where: str | None = None, agree: Any = None) -> list[Told]:
    found, target = then
    return api.salvage(found.name, target, Wanted(tables, None, where), diff=True, agree=agree)["tables"]  # type: ignore[no-any-return]


def agreed(_: Told) -> None:
    """Yes."""


def numbers(told: Told) -> tuple[int, int, int]:
    found = told["difference"]
    return found["deleted"], found["changed"], found["added"]


def test_rows_are_chosen_as_they_were(then: tuple[ProtectedSet, Target]) -> None:
    """A row that the condition was true for is the same row now, whatever the condition says of it now."""
    found = then[0]
    found.sql("update o set status = 'void' where id <= 50")
    found.sql("delete from o where id in (60, 95)")
    found.sql("update o set status = 'paid' where id = 99")
    found.sql("insert into o values (101, 'paid'), (102, 'void')")
    told = salvage(then, "o", where="status = 'paid'")[0]
    assert numbers(told) == (1, 50, 1)
    assert told["difference"]["samples"]["added"] == [{"id": "101"}], "99 was there then, as another row of the table"
    told = salvage(then, "o", where="status = 'paid'", agree=agreed)[0]
    assert told["put_back"] == {"inserted": 1, "updated": 50}
    assert found.sql("select count(*) from o where status = 'paid'") == [(92,)]
    assert found.sql("select count(*) from o where id in (95, 99)") == [(1,)]


@pytest.mark.parametrize(
    "meanwhile",
    [
        "update o set status = 'precious' where id = 3",
        "delete from o where id = 3",
        "insert into o values (4, 'again')",
        "delete from o where id = 50",
    ],
)
def test_what_others_did_before_the_yes_is_not_overwritten(then: tuple[ProtectedSet, Target], meanwhile: str) -> None:
    found = then[0]
    found.sql("update o set status = 'void' where id <= 3")
    found.sql("delete from o where id = 4")
    with pytest.raises(PreconditionError, match="has changed since the difference was shown"):
        salvage(then, "o", agree=lambda _: found.sql(meanwhile))
    after = found.sql("select * from o order by id")
    assert salvage(then, "o", agree=lambda _: found.sql("insert into o values (1000, 'new')"))[0]["put_back"]
    assert found.sql("select * from o order by id") != after
    assert found.sql("select count(*) from o") == [(101,)], "a new row is in nobody's way"


def test_triggers_that_bend_rows_stop_it(then: tuple[ProtectedSet, Target]) -> None:
    found = then[0]
    found.sql("update trg set v = 'b' where id <= 5")
    found.sql("delete from trg where id = 9")
    before = found.sql("select * from trg order by id")
    with pytest.raises(PgcdpError, match="5 not be as they were: its triggers or rules touching changed them"):
        salvage(then, "trg", agree=agreed)
    assert found.sql("select * from trg order by id") == before, "nothing stays written"
    found.sql("alter table trg disable trigger touching")
    assert salvage(then, "trg", agree=agreed)[0]["put_back"] == {"inserted": 1, "updated": 5}
    assert found.sql("select count(*) from trg where v = 'a' and upd = 'old'") == [(10,)]


def test_identity_columns(then: tuple[ProtectedSet, Target]) -> None:
    found = then[0]
    found.sql("delete from one where id > 3")
    found.sql("update one set v = 'y' where id = 1")
    assert salvage(then, "one", agree=agreed)[0]["put_back"] == {"inserted": 2, "updated": 1}
    assert found.sql("select array_agg(id order by id), min(v), max(v) from one") == [([1, 2, 3, 4, 5], "x", "x")]
    found.sql("delete from one where id = 2")
    found.sql("update one set id = default where id = 3")
    with pytest.raises(PreconditionError, match=r"column id of public\.one is generated always as identity") as raised:
        salvage(then, "one", agree=agreed)
    assert "alter table public.one alter column id set generated by default" in str(raised.value.hint)
    assert found.sql("select count(*) from one") == [(4,)]


def test_several_tables_come_back_together(then: tuple[ProtectedSet, Target]) -> None:
    found = then[0]
    found.sql("delete from parent")
    with pytest.raises(PgcdpError, match="violates foreign key"):
        salvage(then, "child", agree=agreed)
    found.sql("update trg set v = 'b'")
    with pytest.raises(PgcdpError, match="touching"):
        salvage(then, "child", "parent", "trg", agree=agreed)
    assert found.sql("select (select count(*) from parent), (select count(*) from child)") == [(0, 0)], "all or nothing"
    told = salvage(then, "child", "parent", agree=agreed)
    assert [each["put_back"] for each in told] == [{"inserted": 10, "updated": 0}] * 2
    assert found.sql("select (select count(*) from parent), (select count(*) from child)") == [(10, 10)]
    with pytest.raises(PreconditionError, match=r"heirs \(public\.heirs_own\)"):
        salvage(then, "heir")


def test_a_plain_session_is_left_as_it_was(then: tuple[ProtectedSet, Target]) -> None:
    """Nothing of the comparing stays in the running database."""
    salvage(then, "o", agree=agreed)
    with session.connect_as_client(then[0].address()) as live:
        left = live.execute("select relname::text from pg_class where relname like 'pgcdp\\_%'").fetchall()
    assert left == []


MOVED = {
    "from a row that is gone": "delete from seats where id = 10; update seats set seat = 'seat 10' where id = 2",
    "from a row that is gone and is referred to": "update seats set next = null where id = 1;"
    " delete from seats where id = 9; update seats set seat = 'seat 9' where id = 2",
    "in a chain": "update seats set seat = 'seat 0' where id = 1; update seats set seat = 'seat 1' where id = 2;"
    " update seats set seat = 'seat 2' where id = 3",
    "in a circle": "update seats set seat = 'away' where id = 1; update seats set seat = 'seat 1' where id = 2;"
    " update seats set seat = 'seat 2' where id = 1",
}


@pytest.mark.parametrize("how", MOVED)
def test_unique_values_that_moved_between_rows_move_back(then: tuple[ProtectedSet, Target], how: str) -> None:
    """In whatever order; what refers to the rows stays."""
    found = then[0]
    found.allowed += [r"duplicate key value violates unique constraint", r"violates foreign key constraint"]
    before = found.sql("select * from seats order by id"), found.sql("select * from tickets order by id")
    found.sql(MOVED[how])
    told = salvage(then, "seats", agree=agreed)[0]
    assert told["put_back"] == {"inserted": told["difference"]["deleted"], "updated": told["difference"]["changed"]}
    assert (found.sql("select * from seats order by id"), found.sql("select * from tickets order by id")) == before


def test_a_value_that_a_new_row_has_is_not_taken_from_it(then: tuple[ProtectedSet, Target]) -> None:
    found = then[0]
    found.allowed.append(r"duplicate key value violates unique constraint")
    found.sql("update seats set seat = 'away' where id = 1; insert into seats values (11, 'seat 1')")
    before = found.sql("select * from seats order by id")
    with pytest.raises(PgcdpError, match=r"Key \(seat\)=\(seat 1\) already exists"):
        salvage(then, "seats", agree=agreed)
    assert found.sql("select * from seats order by id") == before


@pytest.mark.parametrize(
    ("hindrance", "name"),
    [
        ("alter table tickets drop constraint tickets_seat_fkey, add constraint f foreign key (seat) references seats"
         " on delete cascade", "f of tickets"),
        ("create function gone() returns trigger language plpgsql as 'begin return old; end';"
         " create trigger going before delete on seats for each row execute function gone()", "going"),
    ],
)  # fmt: skip
def test_rows_are_not_taken_out_where_that_does_more(
    then: tuple[ProtectedSet, Target], hindrance: str, name: str
) -> None:
    found = then[0]
    found.allowed.append(r"duplicate key value violates unique constraint")
    found.sql(hindrance)
    found.sql(MOVED["from a row that is gone"])
    assert salvage(then, "seats", agree=agreed)[0]["put_back"] == {"inserted": 1, "updated": 1}, "it need not be"
    found.sql(MOVED["in a circle"])
    before = found.sql("select * from seats order by id")
    with pytest.raises(
        PreconditionError, match=rf"seats moved between rows .* because of {name}; nothing was put back"
    ):
        salvage(then, "seats", agree=agreed)
    assert found.sql("select * from seats order by id") == before
    assert found.sql("select count(*) from tickets") == [(8,)]


LOCKS = {
    "table": ("lock table o in row exclusive mode", True),
    "row": ("select * from o where id = 1 for update", True),
    "reading": ("lock table o in access exclusive mode", False),
}


@pytest.mark.parametrize("lock", LOCKS)
def test_who_holds_a_lock_is_named(
    then: tuple[ProtectedSet, Target], lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds the table or a row, it is not waited for without end; nothing is written."""
    monkeypatch.setattr(salvaging, "LIVE_SECONDS", 1.0)
    found = then[0]
    found.allowed.append(r"canceling statement due to lock timeout")
    found.sql("update o set status = 'void' where id <= 3")
    statement, apply = LOCKS[lock]
    with found.connect() as other:
        other.execute("begin")
        other.execute(statement.encode())
        with pytest.raises(
            PreconditionError, match=rf"table public\.o was locked for 1 s by pid {other.info.backend_pid} "
        ) as raised:
            salvage(then, "o", agree=agreed if apply else None)
        assert f"select pg_terminate_backend({other.info.backend_pid})" in str(raised.value.hint)
        assert raised.value.exit_code == 6
        other.execute("commit")
    assert salvage(then, "o", agree=agreed)[0]["put_back"] == {"inserted": 0, "updated": 3}
