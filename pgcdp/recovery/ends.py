"""The ends of an interval's transactions by column: of millions of rows, a question mostly needs one or two columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from pgcdp.records import TRANSACTION

if TYPE_CHECKING:
    import pyarrow as pa

    from pgcdp.store.parquet import Ranges

    Read = Callable[[Sequence[str], Ranges | None], pa.Table]
    """Columns of the transaction index, a row for each table touched, in order of LSN; or parts of them."""

_COLUMNS = tuple("length" if name == "end_lsn" else name for name in TRANSACTION.names or ())


class Ends:
    """Like an array TRANSACTION in order of LSN, each transaction once: `ends["xid"]`, `ends[3]`, `ends[rows]`.

    Of several branches: in the order in which they were written.

    What is asked for is read when it is, by `read`. Raises DamageError then.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._column = cache(self._read_column)

    @cached_property
    def _every_lsn(self) -> NDArray[Any]:
        lsn: NDArray[Any] = self._read(["lsn"], None).column("lsn").to_numpy()
        return lsn

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The first row of each transaction."""
        lsn = self._every_lsn
        if not len(lsn):
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(np.append(True, lsn[1:] != lsn[:-1]))

    @cached_property
    def _lsn(self) -> NDArray[Any]:
        return self._first(self._every_lsn)

    @cached_property
    def _rising(self) -> bool:
        """Whether a row can be found by its LSN: not where a rewind in place has several branches in one interval."""
        return bool((self._lsn[1:] > self._lsn[:-1]).all())

    def with_xid(self, xid: int) -> NDArray[np.void]:
        """Those with this xid (64 bits), a row for each table touched; only what can hold it is read."""
        table = self._read(_COLUMNS, {"xid": [(xid, xid)]})
        return _structured(table, np.flatnonzero(table.column("xid").to_numpy() == xid))

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
        if not len(wanted):
            return np.empty(0, dtype=TRANSACTION)
        if not self._rising:
            return _structured(self._read(_COLUMNS, None), self.rows[key])
        table = self._read(_COLUMNS, {"lsn": [(int(wanted.min()), int(wanted.max()))]})
        return _structured(table, np.searchsorted(table.column("lsn").to_numpy(), wanted))

    def _read_column(self, name: str) -> NDArray[Any]:
        if name == "end_lsn":
            end: NDArray[Any] = self._lsn + self._column("length")
            return end
        return self._first(self._read([name], None).column(name).to_numpy())

    def _first(self, column: NDArray[Any]) -> NDArray[Any]:
        return column if len(column) == len(self.rows) else column[self.rows]


def _structured(table: pa.Table, rows: NDArray[np.integer[Any]]) -> NDArray[np.void]:
    found = np.empty(len(rows), dtype=TRANSACTION)
    for name in _COLUMNS:
        found["end_lsn" if name == "length" else name] = table.column(name).to_numpy()[rows]
    found["end_lsn"] += found["lsn"]
    return found
