"""Each place at which an interval's index becomes durable fails once: the interval is stored, and that is said."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from pgcdp import api
from pgcdp.intervals.indexing import Start, index_interval, read_events
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval
from pgcdp.store.transactions import read_transactions
from tests.faults.points import python_points
from tests.faults.service import Faults
from tests.fix_engine import MIB, _plain_program
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet

MADE = ("transactions.parquet", "wal.parquet", "events.json", "catalog.notes", "wal.state", "relations.parquet")
"""What an index is made of: the next interval begins with what the last three say."""


@pytest.fixture
def engine_program() -> Path:
    """What fails here is Python's: one build of the engine is enough."""
    return _plain_program()


def test_of_an_index(
    make_set: MakeSet, binaries_of: BindirOf, failing: Faults, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = make_set(binaries_of(15), size=384 * MIB, settings={"autovacuum": "off"})
    api.cut(found.name)
    for number in range(20):
        found.sql(f"create table t{number} as select generate_series(1, 100) as n")
    number = int(api.cut(found.name)["number"])
    shutil.copytree(found.store, tmp_path / "store", ignore=shutil.ignore_patterns("image", ".*.new"))
    store = Store.open(tmp_path / "store")
    bundle = Bundle.open(store, number)
    before = Bundle.open(store, number - 1).interval.boundary
    right = read_transactions(bundle.path)
    assert len(right) >= 20
    shutil.copytree(bundle.path, tmp_path / "kept")
    came = []
    ours = ("intervals.indexing.", "intervals.readout.", "store.parquet.")
    for point in sorted(each for each in python_points() if each.startswith(ours)):
        for kind in ("enospc", "eio"):
            shutil.rmtree(store.incoming(number), ignore_errors=True)
            shutil.copytree(tmp_path / "kept", store.incoming(number))
            opened = OpenInterval.open(
                store, number, bundle.interval.from_write, durable_write=bundle.interval.to_write
            )

            def index(it: OpenInterval = opened) -> object:
                return index_interval(
                    it, bundle.interval.boundary,
                    lambda: Start.of(store, before, bundle.settings(), int(found.config.cluster.system_identifier)),
                )  # fmt: skip

            caplog.clear()
            failing.set(point, kind)
            with caplog.at_level(logging.ERROR):
                made = index()
            failing.clear(point)
            if failing.fired(point):
                came.append(point)
                assert made is None, point
                (said,) = [record.getMessage() for record in caplog.records]
                assert f"interval {number}: its transactions cannot be listed" in said, point
                assert str(opened.path) in said, point
            assert index() is not None, point
            assert read_transactions(opened.path).equals(right), point
            assert read_events(opened.path) == read_events(bundle.path), point
            opened.close()
    assert {point.rpartition(".")[2] for point in came} >= {"pwrite", "fsync", "rename", "write_table", "unlink"}
