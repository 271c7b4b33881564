"""The ends of an interval's transactions by column: of millions of rows, a question mostly needs one or two columns."""

from __future__ import annotations

from functools import cache
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.records import TRANSACTION

COLUMNS = tuple("length" if name == "end_lsn" else name for name in TRANSACTION.names or ())
"""Columns of the transaction index that it takes."""


class Ends:
    """Like an array TRANSACTION in order of LSN, each transaction once: `ends["xid"]`, `ends[3]`, `ends[rows]`.

    `table` has COLUMNS of the transaction index, a row for each table touched; `rows`: the first one of each.
    """

    def __init__(self, table: pa.Table) -> None:
        lsn = table.column("lsn").to_numpy()
        self.rows = np.flatnonzero(np.append(True, lsn[1:] != lsn[:-1])) if len(lsn) else np.empty(0, dtype=np.int64)
        self._table = table
        self._all = len(self.rows) == len(lsn)
        self._column = cache(self._read)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, key: str) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, key: int | np.integer[Any]) -> np.void: ...
    @overload
    def __getitem__(self, key: slice | NDArray[Any]) -> NDArray[np.void]: ...
    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._column(key)
        if isinstance(key, int | np.integer):
            return self[np.array([key])][0]
        taken = self._table.take(pa.array(self.rows[key]))
        found = np.empty(len(taken), dtype=TRANSACTION)
        for name in COLUMNS:
            found["end_lsn" if name == "length" else name] = taken.column(name).to_numpy()
        found["end_lsn"] += found["lsn"]
        return found

    def _read(self, name: str) -> NDArray[Any]:
        if name == "end_lsn":
            end: NDArray[Any] = self["lsn"] + self._read("length")
            return end
        column: NDArray[Any] = self._table.column(name).to_numpy()
        return column if self._all else column[self.rows]
