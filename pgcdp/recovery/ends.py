"""The ends of an interval's transactions by column: of millions of rows, a question mostly needs one or two columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgcdp.records import TRANSACTION
from pgcdp.store.parquet import Ranges

_COLUMNS = tuple("length" if name == "end_lsn" else name for name in TRANSACTION.names or ())
Read = Callable[[Sequence[str], Ranges | None], pa.Table]
"""Columns of the transaction index, a row for each table touched, in order of LSN; or parts of them."""


class Ends:
    """Like an array TRANSACTION in order of LSN, each transaction once: `ends["xid"]`, `ends[3]`, `ends[rows]`.

    What is asked for is read when it is, by `read`. Raises DamageError then.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._column = cache(self._read_column)
        lsn: NDArray[Any] = read(["lsn"], None).column("lsn").to_numpy()
        self._length = len(lsn)
        self.rows = np.flatnonzero(np.append(True, lsn[1:] != lsn[:-1])) if len(lsn) else np.empty(0, dtype=np.int64)
        self._lsn = lsn if len(lsn) == len(self.rows) else lsn[self.rows]

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
            return self._lsn if key == "lsn" else self._column(key)
        if isinstance(key, int | np.integer):
            return self[np.array([key])][0]
        wanted = self._lsn[key]
        found = np.empty(len(wanted), dtype=TRANSACTION)
        if len(wanted):
            table = self._read(_COLUMNS, {"lsn": [(int(wanted.min()), int(wanted.max()))]})
            rows = np.searchsorted(table.column("lsn").to_numpy(), wanted)
            taken = table.take(pa.array(rows))
            for name in _COLUMNS:
                found["end_lsn" if name == "length" else name] = taken.column(name).to_numpy()
            found["end_lsn"] += found["lsn"]
        return found

    def _read_column(self, name: str) -> NDArray[Any]:
        if name == "end_lsn":
            end: NDArray[Any] = self._lsn + self._column("length")
            return end
        column: NDArray[Any] = self._read([name], None).column(name).to_numpy()
        return column if len(self.rows) == self._length else column[self.rows]
