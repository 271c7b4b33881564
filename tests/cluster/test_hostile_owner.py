"""Somebody owns a database, or the cluster, and would like to be more: pgcdp is root, and a superuser in Postgres."""

from __future__ import annotations

import asyncio
import os
import shlex

import pytest

from pgcdp.capture import checks
from pgcdp.postgres import catalogs, cluster, role, session
from pgcdp.postgres.agent_session import Session
from pgcdp.postgres.cluster import Binaries
from tests.fix_postgres import PORT, BindirOf, Live, MakeCluster

EVIL = """
create schema evil;
create function evil.take() returns boolean language plpgsql as $$
begin
  perform pg_catalog.set_config('role', 'none', false);
  execute 'alter role mallory superuser';
  return true;
exception when insufficient_privilege then return true;
end $$;
create function evil.current_setting(text) returns text language plpgsql as
  $$ begin perform evil.take(); return pg_catalog.current_setting($1); end $$;
"""
SHADOWED = ("pg_class", "pg_namespace", "pg_database", "pg_roles", "pg_settings", "pg_inherits", "pg_locks", "pg_proc",
            "pg_tablespace", "pg_auth_members")  # fmt: skip


@pytest.fixture
def owned(make_cluster: MakeCluster, pg_binaries: Binaries) -> Live:
    """A cluster whose database shop is mallory's, who has had his way with its search path."""
    live = make_cluster(pg_binaries)
    live.sql("create role mallory login")
    live.sql("create database shop owner mallory")
    with live.connect("shop") as connection:
        connection.execute("set session authorization mallory")
        connection.execute(EVIL)
        for name in SHADOWED:
            connection.execute(f"create view evil.{name} as select * from pg_catalog.{name} where evil.take()".encode())
            connection.execute(f"grant select on evil.{name} to public".encode())
        connection.execute("grant usage on schema evil to public")
        connection.execute("alter database shop set search_path = evil, pg_catalog")
    return live


def is_superuser(live: Live) -> bool:
    return bool(live.sql("select rolsuper from pg_roles where rolname = 'mallory'")[0][0])


def test_who_owns_a_database_does_not_become_superuser_by_its_search_path(owned: Live) -> None:
    """As protect, check and agent ask: each statement that names pg_class means that of pg_catalog."""
    dsn = owned.address()
    for _ in range(2):  # before the role is there, and with it
        look, failed = asyncio.run(catalogs.look(dsn, None, 30))
        assert failed == {}
        assert "shop" in look.databases.values()
        assert not is_superuser(owned)
        assert "shop" in role.install(dsn)
        assert role.missing(dsn) == []
        assert role.excess(dsn) == ([], "")
        assert not is_superuser(owned)
    with session.connect_as_client(dsn, "shop") as connection:  # as salvage writes: names of tables mean theirs
        assert session.query(connection, "select count(*) from pg_class").rows
        assert session.query(connection, "show search_path").rows == [("evil",)]
    assert not is_superuser(owned)
    with owned.connect("shop") as connection:
        connection.execute("select 1 from pg_class")
    assert is_superuser(owned), "so it would have been"


def test_a_path_of_a_database_is_its_own_but_for_pg_catalog(make_cluster: MakeCluster, binaries_of: BindirOf) -> None:
    live = make_cluster(binaries_of(15))
    for path, left in (
        ('"$user", public', '"$user", public'),
        ('"a, pg_catalog", pg_catalog, b', '"a, pg_catalog", b'),
        ('"we\\\'ird", "pg_catalog"', '"we\\\'ird"'),
        ("pg_catalog", ""),
    ):
        for standard in ("on", "off"):
            live.sql(f"alter database postgres set search_path = {path}")
            live.sql(f"alter database postgres set standard_conforming_strings = {standard}")
            with session.connect_as_client(live.address()) as connection:
                shown = session.query(connection, "select pg_catalog.current_setting('search_path')").rows
                assert shown == [(left,)], path
                assert session.query(connection, "select 'pg_class'::regclass::oid").rows == [(1259,)]


# --- the least rights


def asked(live: Live, begin: int) -> list[str]:
    """Statements in its log behind that byte."""
    text = live.log_file.read_bytes()[begin:].decode()
    return [line.partition("statement: ")[2] for line in text.splitlines() if "statement: " in line]


async def _checkpoint(live: Live) -> tuple[str, list[str]]:
    """Who the agent is, and what is asked for a checkpoint."""
    agent = await Session.open(live.address())
    try:
        ((name,),) = await agent.rows("select current_user::text")
        begin, before = live.log_file.stat().st_size, live.control().checkpoint_lsn
        await agent.checkpoint()
        assert live.control().checkpoint_lsn > before
        ((still,),) = await agent.rows("select current_user::text")
        assert still == name
        settings = await agent.settings()
        assert settings["hba"] is not None, "for which more rights are needed, which it gives back"
        assert await agent.rows("select current_user::text") == [(name,)]
        return name, [each for each in asked(live, begin) if "role" in each or "checkpoint" in each][:2]
    finally:
        await agent.close()


def test_agent_and_check_have_the_least_rights_that_do(make_cluster: MakeCluster, pg_binaries: Binaries) -> None:
    live = make_cluster(pg_binaries, log_statement="all")
    dsn = live.address()

    def who() -> str:
        with session.connect(dsn) as connection:
            rows = session.query(connection, "select current_user::text").rows
        assert rows is not None
        return str(rows[0][0])

    all_rights = ["set role none", "checkpoint"]
    assert who() == "pg_monitor"
    assert asyncio.run(_checkpoint(live)) == ("pg_monitor", all_rights)
    role.install(dsn)
    assert who() == "pgcdp"
    name, statements = asyncio.run(_checkpoint(live))
    assert (name, statements[0]) == ("pgcdp", "checkpoint"), "from 15 on there is a role for it"
    live.sql("revoke pg_checkpoint from pgcdp")
    assert asyncio.run(_checkpoint(live)) == ("pgcdp", all_rights), "it is cut all the same; check says what is missing"
    live.sql("revoke pg_read_all_settings from pgcdp")
    assert who() == "pg_monitor"
    assert role.missing(dsn) == ["membership in pg_read_all_settings", "membership in pg_checkpoint"]
    role.install(dsn)
    live.sql("alter role pgcdp superuser")
    assert who() == "pg_monitor", "that would be no less"


def test_what_the_role_has_beyond_what_it_needs_is_told(make_cluster: MakeCluster, pg_binaries: Binaries) -> None:
    live = make_cluster(pg_binaries)
    dsn = live.address()
    assert role.excess(dsn) == ([], "")
    role.install(dsn)
    assert role.excess(dsn) == ([], "")
    live.sql('create role "odd""one"')
    live.sql("alter role pgcdp createdb bypassrls")
    live.sql('grant "odd""one", pg_read_all_data to pgcdp')
    more, sql = role.excess(dsn)
    assert more == ["CREATEDB", "BYPASSRLS", 'member of odd"one', "member of pg_read_all_data"]
    for statement in sql.split("; "):
        live.sql(statement)
    assert role.excess(dsn) == ([], "")
    assert role.missing(dsn) == []


def test_a_membership_that_is_not_inherited_is_missing(make_cluster: MakeCluster, pg_binaries: Binaries) -> None:
    live = make_cluster(pg_binaries)
    dsn = live.address()
    role.install(dsn)
    if pg_binaries.major >= 16:
        live.sql("grant pg_checkpoint to pgcdp with inherit false")
    else:
        live.sql("alter role pgcdp noinherit")
    assert "membership in pg_checkpoint" in role.missing(dsn)
    role.install(dsn)
    assert role.missing(dsn) == []


# --- the cluster's owner


def test_programs_that_the_clusters_owner_chose_are_not_run_as_root(
    make_cluster: MakeCluster, binaries_of: BindirOf
) -> None:
    """Where they are is told by the command line of the postmaster, which is his."""
    real = binaries_of(15).path("postgres")
    live = make_cluster(binaries_of(15), start=False)
    chosen, seen = live.root / "bin", live.root / "seen"
    chosen.mkdir()
    (chosen / "postgres").symlink_to(real)
    os.chown(chosen, live.user.uid, live.user.gid)
    options = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={live.sockets}", "-c", f"port={PORT}")
    argv = (str(chosen / "postgres"), "-D", str(live.pgdata), *options)
    cluster.start(argv, live.pgdata, live.user, live.log_file)
    (chosen / "postgres").unlink()
    (chosen / "postgres").write_text(f'#!/bin/sh\nid -u >>{seen}\nexec {real} "$@"\n')
    (chosen / "postgres").chmod(0o755)
    seen.touch()
    seen.chmod(0o666)
    facts, running = checks.facts_of(live.pgdata, None, live.root)
    assert (facts.bindir, running) == (chosen, True)
    assert set(seen.read_text().split()) == {str(live.user.uid)}
    live.stop()
    seen.write_text("")
    (live.pgdata / "postmaster.opts").write_text(shlex.join(argv))
    facts, running = checks.facts_of(live.pgdata, None, live.root)
    assert (facts.command_line, facts.port, running) == (argv, PORT, False)
    assert set(seen.read_text().split()) == {str(live.user.uid)}
