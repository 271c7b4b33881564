"""All that is done with a set, done with an encrypted one: nothing of it needs a plain store, or makes a file plain."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from pgcdp import api
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Span
from pgcdp.store.retention import Plan
from tests.cluster.test_expire import carry_out, set_policy
from tests.cluster.test_outside import NOISE, new_space
from tests.cluster.test_store_alone import clean_machine, pgcdp, started
from tests.fix_keys import MakeKey, plain_files
from tests.fix_sets import MakeSet, ProtectedSet
from tests.small_store import flip

SECRET = "a row that nobody may read 51d0c3aa"
GONE = ("--before", "DELETE FROM orders")


def rows(dsn: str) -> int:
    with psycopg.connect(dsn) as session:
        (row,) = session.execute("select count(*) from orders where what like %s", [f"{SECRET}%"]).fetchall()
        return int(row[0])


def nothing_is_plain(store: Path) -> None:
    assert plain_files(store) == []
    for file in (path for path in store.rglob("*") if path.is_file()):
        with suppress(FileNotFoundError):  # the agent goes on meanwhile
            assert SECRET.encode() not in file.read_bytes(), file


def failing(found: ProtectedSet, code: int) -> list[str]:
    return [each["name"] for each in pgcdp("check", found.name, code=code)["checks"] if not each["ok"]]


@pytest.mark.timeout(600)
def test_every_way_leads_through_an_encrypted_set(
    make_set: MakeSet, pg15: Binaries, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch, no_clone_stays: None
) -> None:
    monkeypatch.delenv("PGCDP_ENCRYPT_KEY_FILE", raising=False)
    key = make_key().file
    assert key is not None
    found = make_set(pg15, size=512 << 20, settings={"autovacuum": "off"}, allowed=NOISE, encrypt_key_file=key)
    name, numbers = found.name, list[int]()
    for statement in (
        f"create table orders as select n as id, '{SECRET}' || n as what from generate_series(1, 100) n",
        "update orders set what = what || '!'",
        "insert into orders values (101, 'one that anybody may read')",
        "delete from orders where id between 61 and 100",
    ):
        found.sql(statement)
        numbers.append(int(api.cut(name)["number"]))
    found.sql(f"insert into orders values (102, '{SECRET} behind the last boundary')")

    # Found, opened, moved, brought back from.
    (gone,) = pgcdp("find", name, "DELETE FROM orders")["transactions"]
    assert [(each["name"], each["deleted"]) for each in gone["tables"]] == [("orders", 40)]
    made = pgcdp("clone", name, *GONE, "--name", "before")
    assert rows(made["dsn"]) == 100
    assert rows(pgcdp("step", "before", "1", "--commit")["dsn"]) == 60
    assert rows(pgcdp("step", "before", "1", "--commit")["dsn"]) == 61
    assert rows(pgcdp("step", "before", "-2", "--commit")["dsn"]) == 100
    pgcdp("destroy", "before")
    file = found.root / "orders.sql"
    pgcdp("salvage", name, *GONE, "--table", "orders", "--file", str(file))
    assert file.read_text().count(SECRET) == 100
    nothing_is_plain(found.store)

    # Production rewound, and that undone; then what is restored is what the volume holds.
    told = pgcdp("restore", name, "--in-place", *GONE, "--yes")
    assert told["verified"]
    assert rows(found.dsn()) == 100
    assert pgcdp("restore", name, "--in-place", "--target-name", told["undo"], "--yes")["verified"]
    assert rows(found.dsn()) == 61
    api.down(name)
    found.assert_volume_is_newest()
    api.up(name)

    # Retention, and the catalog from what that left; a copy of the data key that is damaged.
    carry_out(found, Plan(thin=(numbers[0],), joins=(Span(numbers[1], numbers[2]),)))
    nothing_is_plain(found.store)
    assert pgcdp("check", name, "--full")["ok"]
    flip(found.store / "encryption.json", 100)
    assert failing(found, 5) == ["store"]
    before = pgcdp("info", name)["intervals"]
    assert pgcdp("rebuild", name)["damages"] == []
    assert failing(found, 0) == []
    assert pgcdp("info", name)["intervals"][: len(before)] == before
    carry_out(found, Plan(base=numbers[2]))
    assert pgcdp("verify", name, "--target-boundary", str(numbers[2]))["ok"]
    assert pgcdp("check", name, "--full")["ok"]
    nothing_is_plain(found.store)

    # A key that would be locked into what it opens.
    inside = found.pgdata / "key"
    shutil.copy(key, inside)
    set_policy(found, encrypt_key_file=str(inside))
    assert failing(found, 6) == ["place of the key"]
    set_policy(found, encrypt_key_file=str(key))
    inside.unlink()

    # A copy on another machine.
    copy, place = found.root / "copy", found.root / "restored"
    with clean_machine(found, copy):
        alone, opened = ["--store", str(copy)], ["--encrypt-key-file", str(key)]
        assert "no key is given" in pgcdp("clone", *alone, "--name", "alone", code=6)["error"]["message"]
        assert rows(pgcdp("clone", *alone, *opened, "--name", "alone")["dsn"]) == 61
        assert "no key is given" in pgcdp("step", "alone", "-1", "--commit", code=6)["error"]["message"]
        assert rows(pgcdp("step", "alone", "-1", "--commit", *opened)["dsn"]) == 60
        pgcdp("destroy", "alone")
        assert pgcdp("restore", *alone, "--to-directory", str(place), code=6)["error"]["kind"] == "precondition"
        assert not place.exists()
        pgcdp("restore", *alone, *opened, "--to-directory", str(place))
        with started(found, place) as session:
            assert session.execute("select count(*) from orders").fetchone() == (62,)

    # A key that a tablespace would take along.
    found.up()
    found.wait_following()
    space, _ = new_space(found, "late")
    shutil.copy(key, space / "key")
    set_policy(found, encrypt_key_file=str(space / "key"))
    refused = pgcdp("protect", name, "--tablespace", "late=64MiB", "--yes", code=6)["error"]["message"]
    assert f"{space / 'key'} lies in {space}, which is captured" in refused
    set_policy(found, encrypt_key_file=str(key))
