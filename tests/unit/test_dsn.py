"""A connection string means what was put into it, whatever a role or a directory is called."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from psycopg import conninfo

from pgcdp.postgres.session import dsn_text

NAMES = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))


@given(host=NAMES, role=NAMES, database=NAMES)
def test_libpq_reads_what_was_written(host: str, role: str, database: str) -> None:
    told = conninfo.conninfo_to_dict(dsn_text(host, 5432, role, database))
    assert told == {"host": host, "port": "5432", "user": role, "dbname": database}
