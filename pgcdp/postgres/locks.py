"""Who holds locks on tables of a running database that others wait for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from psycopg import sql

from pgcdp.errors import PreconditionError
from pgcdp.postgres.tables import LockedError, TableShape

if TYPE_CHECKING:
    from pgcdp.postgres.session import Connection

_HOLDERS_SQL = """
select distinct l.pid, a.usename::text, a.application_name, left(a.query, 100), x.gid
from pg_locks l left join pg_stat_activity a on a.pid = l.pid
left join pg_prepared_xacts x on l.pid is null and l.virtualtransaction = '-1/' || x.transaction::text
where l.locktype = 'relation' and l.granted and l.relation = any (%s::oid[]) and l.mode <> 'AccessShareLock'
  and l.database = (select oid from pg_database where datname = current_database())
  and l.pid is distinct from pg_backend_pid()
order by 1, 5
"""


@contextmanager
def waiting_at_most(target: Connection, shapes: Sequence[TableShape], seconds: float) -> Iterator[None]:
    """No lock of the running database is waited for longer. Raises PreconditionError that names who holds tables."""
    target.execute(sql.SQL("set lock_timeout = {}").format(round(seconds * 1000)))
    try:
        yield
    except LockedError as error:
        rows = target.execute(_HOLDERS_SQL.encode(), [[part.oid for each in shapes for part in each.parts]]).fetchall()
        if not rows:
            raise error from None
        names = ", ".join(map(str, shapes))
        pids = [row[0] for row in rows if row[0] is not None]
        hint = "commit or roll back what is prepared, and run it again"
        if pids:
            ends = "; ".join(f"select pg_terminate_backend({pid})" for pid in pids)
            hint = f"wait until that is over, or end it ({ends}), and run it again"
        raise PreconditionError(
            f"table {names} was locked for {seconds:g} s by {', '.join(_holder(*row) for row in rows)}", hint
        ) from None


def _holder(pid: int | None, user: str | None, program: str | None, query: str | None, prepared: str | None) -> str:
    if pid is None:
        return f'the prepared transaction "{prepared}"' if prepared else "a prepared transaction"
    words = [each for each in (user, program, query and " ".join(query.split())) if each]
    return f"pid {pid} ({', '.join(words)})" if words else f"pid {pid}"
