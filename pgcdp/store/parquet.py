"""Tables of a store as Parquet: written whole, synced; read by columns, and by parts that can hold what is meant."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pgcdp.errors import DamageError
from pgcdp.fsio import read_file, sync_directory, sync_file, write_file
from pgcdp.sealing import sealer_of
from pgcdp.store.frames import FileSummary, summary_of

ROW_GROUP = 1 << 16
"""Rows of a row group: what is looked for is seldom in more than a few of them."""

Ranges = Mapping[str, Sequence[tuple[int, int]]]
"""For columns of numbers: what is looked for lies in one of these ranges, bounds included."""


def write_table(path: Path, table: pa.Table, *, rising: Sequence[str], repeated: Sequence[str]) -> FileSummary:
    """Write a table, compressed and synced; one that is there is replaced.

    `rising`: columns that rise steadily, stored as differences; `repeated`: those with few different values.
    """
    fresh = path.with_suffix(".new")
    plain, made = sealer_of(path) is None, io.BytesIO()
    names = table.schema.names
    try:
        pq.write_table(
            table,
            fresh if plain else made,
            compression="zstd",
            use_dictionary=[name for name in names if name in repeated and name not in rising],
            column_encoding={name: "DELTA_BINARY_PACKED" for name in names if name in rising} or None,
            row_group_size=ROW_GROUP,
            write_page_checksum=True,
        )
    except OSError as error:
        error.filename = error.filename or os.fspath(fresh)
        raise
    if not plain:
        write_file(path, made.getvalue())
        return summary_of(path)
    sync_file(fresh)
    fresh.rename(path)
    sync_directory(path.parent)
    return summary_of(path)


def read_table(path: Path, still: str, columns: Sequence[str] | None = None, within: Ranges | None = None) -> pa.Table:
    """Some columns of a table; with `within`, only the parts of it that can hold what is looked for.

    Raises DamageError with the file and `still`, what can be done all the same; FileNotFoundError.
    """
    try:
        source = path if sealer_of(path) is None else pa.BufferReader(_of_arrow(read_file(path)))
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            groups = [
                group for group in range(file.num_row_groups) if _may_hold(file.metadata.row_group(group), within)
            ]
            return file.read_row_groups(groups, columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DamageError(f"{path} is damaged (offset unknown to parquet): {error}", still) from None


def _of_arrow(content: bytes) -> pa.Buffer:
    """Bytes in Arrow's own memory.

    The one of Arrow's threads that lets go of a Python object last takes the interpreter's lock for it; where the
    process ends in that moment, it ends with SIGABRT (apache/arrow issue 34314).
    """
    made = pa.BufferOutputStream()
    made.write(content)
    return made.getvalue()


def _may_hold(group: Any, within: Ranges | None) -> bool:
    """Whether a row group can have a row within the ranges, by its statistics."""
    if not within:
        return True
    for at in range(group.num_columns):
        column = group.column(at)
        ranges = within.get(column.path_in_schema)
        said = column.statistics
        if ranges is None or said is None or not said.has_min_max:
            continue
        if not any(low <= said.max and said.min <= high for low, high in ranges):
            return False
    return True
