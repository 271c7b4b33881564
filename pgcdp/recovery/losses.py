"""What a rewind takes from production: the transactions beyond its point, and what they did to which table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pgcdp.records import COMMITTED, COMMITTED_PREPARED
from pgcdp.recovery.commits import is_committed
from pgcdp.recovery.dropped import HIDDEN_SCHEMAS
from pgcdp.recovery.history import Transactions

_NAMES = ("database", "schema", "name")
_COUNTS = ("inserted", "updated", "deleted")


def count(transactions: Transactions) -> dict[str, Any]:
    """{"transactions", "oldest", "newest", "tables"}, and "unknown" when there may be others.

    How many committed, the first and the last of them (a row of TRANSACTION, or None), and for each table the sums of
    its rows, largest first, those of the system behind all others.
    """
    number_of, oldest, newest = 0, None, None
    parts = []
    for number in transactions.numbers:
        ends = transactions.commits(number).ends
        rows = np.flatnonzero(is_committed(ends))
        if not len(rows):
            continue
        number_of += len(rows)
        oldest = ends[rows[0]] if oldest is None else oldest
        newest = ends[rows[-1]]
        table = transactions.table(number, [*_NAMES, *_COUNTS, "status"])
        table = table.filter(pc.is_in(table["status"], pa.array([COMMITTED, COMMITTED_PREPARED], table["status"].type)))
        columns = {
            name: table[name].cast(pa.string() if name in _NAMES else pa.uint64()) for name in [*_NAMES, *_COUNTS]
        }
        parts.append(pa.table(columns))
    tables: list[dict[str, Any]] = []
    if parts:
        sums = pa.concat_tables(parts).group_by(list(_NAMES)).aggregate([(name, "sum") for name in _COUNTS])
        told = [{key.removesuffix("_sum"): value for key, value in row.items()} for row in sums.to_pylist()]
        tables = sorted(
            (row for row in told if row["name"] is not None),
            key=lambda row: (row["schema"] in HIDDEN_SCHEMAS, -sum(row[name] for name in _COUNTS)),
        )
    history = transactions.history()
    return {
        "transactions": number_of,
        "oldest": oldest,
        "newest": newest,
        "tables": tables,
        **({"unknown": history.not_indexed(history.doubtful)} if history.doubtful else {}),
    }
