"""What a recovery point is between: the last transaction in, the first one out; and how a command tells of one.

As in `pgcdp.api`, each returns plain values in the shape of docs/json.md. Without what lists and finds transactions,
so that a clone does not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pgcdp.records import RecoveryPoint
from pgcdp.recovery.branches import beyond, branch_at, current_branch
from pgcdp.recovery.commits import STATUS
from pgcdp.recovery.neighbours import Around, around
from pgcdp.recovery.source import Source
from pgcdp.units import format_lsn, format_time

if TYPE_CHECKING:
    from pgcdp.recovery.history import Transactions

Json = dict[str, Any]


def around_json(source: Source, point: RecoveryPoint) -> Json:
    """{"last_in", "first_out", "out", "also_out"}: the transactions on both sides of a point, how many it leaves out.

    `also_out` are those that committed before the target, and are out all the same.
    """

    def look() -> Json:
        transactions = source.transactions()
        found = _around(transactions, point)
        return {
            "last_in": side(found.last_in),
            "first_out": side(found.first_out),
            "out": found.out if not found.unknown else None,
            "also_out": [side(end) for end in found.also_out],
            **({"unknown": transactions.everywhere().history().not_indexed(found.unknown)} if found.unknown else {}),
        }

    return source.again(look)


def _around(transactions: Transactions, point: RecoveryPoint) -> Around:
    """On both sides of a point; when it lies on a branch that was left, what the current one has instead is out."""
    rewinds = transactions.rewinds()
    here = branch_at(point.write, point.lsn, rewinds)
    left = beyond(here, current_branch(rewinds))
    if not left:
        return around(point.write, point.lsn, transactions.history(), point.until_lsn)
    inside = around(point.write, point.lsn, transactions.on(here).history())
    outside = around(0, None, transactions.on(beyond(current_branch(rewinds), here)).history())
    return Around(inside.last_in, outside.first_out, outside.out, [], sorted({*inside.unknown, *outside.unknown}))


def last_in(source: Source, write: int) -> Json | None:
    """The last transaction of the current branch that committed up to a write."""
    return source.again(lambda: side(around(write, None, source.transactions().history()).last_in))


def side(end: np.void | None) -> Json | None:
    """The same, or None."""
    return None if end is None else end_json(end)


def end_json(end: np.void) -> Json:
    """A transaction's end, without what it did."""
    return {
        "xid": int(end["xid"]),
        "time": format_time(int(end["time_us"]) * 1000),
        "lsn": format_lsn(int(end["lsn"])),
        "write": int(end["write"]),
        "status": STATUS[int(end["status"])],
    }
