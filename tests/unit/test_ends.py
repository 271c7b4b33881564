"""The ends of transactions by column: each row is the one that was asked for, also where LSNs come twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pgcdp.recovery.ends import Ends
from pgcdp.store.parquet import Ranges

NAMES = ("lsn", "length", "write", "time_us", "xid", "timeline", "begin_at", "end_at", "status", "late", "back")


def ends_with(lsns: Sequence[int], xids: Sequence[int]) -> Ends:
    """Ends whose row groups are single rows, as far apart as they can be."""
    columns = {name: np.zeros(len(lsns), dtype=np.int64) for name in NAMES}
    whole = pa.table({**columns, "lsn": np.array(lsns, dtype=np.uint64), "xid": np.array(xids, dtype=np.uint64)})

    def read(names: Sequence[str], within: Ranges | None) -> pa.Table:
        keep = np.ones(len(lsns), dtype=np.bool_)
        for name, ranges in (within or {}).items():
            column = whole.column(name).to_numpy()
            keep &= np.logical_or.reduce([(column >= low) & (column <= high) for low, high in ranges])
        return whole.filter(pa.array(keep)).select(list(names))

    return Ends(read)


def check_rows(ends: Ends, xids: Sequence[int]) -> None:
    assert ends["xid"].tolist() == list(xids)
    assert [int(ends[at]["xid"]) for at in range(len(xids))] == list(xids)
    assert ends[np.array([len(xids) - 1, 0])]["xid"].tolist() == [xids[-1], xids[0]]
    assert ends[ends["xid"] > xids[0]]["xid"].tolist() == [xid for xid in xids if xid > xids[0]]
    assert ends[1:]["xid"].tolist() == list(xids[1:])


def test_a_transaction_that_touched_several_tables_is_one() -> None:
    check_rows(ends_with([10, 20, 20, 20, 30], [1, 2, 2, 2, 3]), [1, 2, 3])


def test_two_branches_in_one_interval_are_told_apart() -> None:
    """Behind a rewind in place LSNs begin anew: a row is not found by its LSN then."""
    check_rows(ends_with([10, 20, 30, 40, 20, 30, 35], [1, 2, 3, 4, 12, 13, 14]), [1, 2, 3, 4, 12, 13, 14])
    assert len(ends_with([], [])[:]) == 0
