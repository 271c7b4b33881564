"""Postgres ends the agent's session, as it does when it is stopped: that is never a bug of ours, whenever it comes.

The library takes what a backend says as it ends for the answer to a question that nobody has asked, and every question
behind that for one too many, until it has seen the connection end.
"""

from __future__ import annotations

import asyncio
from contextlib import closing, suppress

import pytest

from pgcdp import proc
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres.agent_session import NotRunning, Session
from pgcdp.postgres.catalogs import look
from tests.fix_postgres import BindirOf, Live, MakeCluster
from tests.waiting import pass_time, wait_until

TURNS = 8
"""Of the event loop, until it has read all that a backend has left behind."""


async def ended(live: Live, turns: int) -> Session:
    """A session whose backend has ended, with that read of what it left which so many turns of the loop read."""
    agent = await Session.open(live.address())
    ((pid,),) = await agent.rows("select pg_backend_pid()")
    live.sql(f"select pg_terminate_backend({pid})")
    wait_until(lambda: not proc.exists(pid), what="the backend's end")  # the loop stands still meanwhile
    for _ in range(turns):
        await asyncio.sleep(0)
    return agent


@pytest.mark.parametrize("question", ["settings", "checkpoint", "checkpoint_lsn", "rows"])
def test_a_question_to_a_backend_that_has_just_ended(
    make_cluster: MakeCluster, binaries_of: BindirOf, question: str
) -> None:
    live = make_cluster(binaries_of(15))

    async def ask(turns: int) -> None:
        agent = await ended(live, turns)
        with pytest.raises(PreconditionError):
            await (agent.rows("select 1") if question == "rows" else getattr(agent, question)())
        await agent.close()
        assert agent.closed

    for turns in range(TURNS):
        asyncio.run(ask(turns))


def test_a_session_that_is_closed_when_its_backend_has_just_ended(
    make_cluster: MakeCluster, binaries_of: BindirOf
) -> None:
    live = make_cluster(binaries_of(15))

    async def close(turns: int) -> None:
        agent = await ended(live, turns)
        await agent.close()
        assert agent.closed

    for turns in range(TURNS):
        asyncio.run(close(turns))


def test_postgres_is_stopped_as_it_is_asked(make_cluster: MakeCluster, binaries_of: BindirOf) -> None:
    """Wherever in a session's life, from its start to its end."""
    live = make_cluster(binaries_of(15))

    def stop_soon(number: int) -> None:
        pass_time(0.004 * number)
        live.stop()

    async def settings() -> None:
        agent = await Session.open(live.address())
        try:
            await agent.settings()
            await agent.checkpoint()
        finally:
            await agent.close()

    async def catalogs() -> None:
        found, failed = await look(live.address(), None, 30.0)
        assert {"template1", "postgres"} <= {*found.databases.values()}
        assert not failed, "no database refuses anything: it is Postgres that does not run"

    async def ask_until_it_has_stopped(number: int) -> None:
        stopping = asyncio.create_task(asyncio.to_thread(stop_soon, number))
        while not stopping.done():
            await asyncio.sleep(0.001)  # where nobody listens, asking does not give way to the loop
            for question in (settings, catalogs):
                with suppress(PgcdpError):  # anything else is a bug of ours
                    await question()
        await stopping

    for number in range(6):
        asyncio.run(ask_until_it_has_stopped(number))
        live.start()


def test_a_look_as_postgres_is_stopped_warns_of_no_database(make_cluster: MakeCluster, binaries_of: BindirOf) -> None:
    """One that it is just at cannot be looked into, and it is not that one which is in the way."""
    live = make_cluster(binaries_of(15))
    live.sql("create database shop")

    async def stopped_meanwhile() -> None:
        looking = asyncio.create_task(look(live.address(), None, 30.0))
        while live.sql("select count(*) from pg_locks where not granted") == [(0,)]:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(live.stop)
        await looking

    with closing(live.connect("shop")) as other:
        other.execute("begin")
        other.execute("lock table pg_class in access exclusive mode")
        with pytest.raises(NotRunning, match="cannot connect to postgres"):
            asyncio.run(stopped_meanwhile())
