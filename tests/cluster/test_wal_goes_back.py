"""An older copy of the data directory in its place: WAL goes back on the same timeline, and is followed from there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import xxhash

from pgcdp import api
from pgcdp.capture import attach
from pgcdp.intervals.indexing import Start
from pgcdp.records import Target
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet


def put_in_place(found: ProtectedSet, copy: Path) -> None:
    """The cluster is stopped, its data directory becomes the copy, and it is started again."""
    attach.stop_cluster(found.config)
    for each in found.pgdata.iterdir():
        if each.name == "lost+found":
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()
    subprocess.run(["cp", "-a", f"{copy}/.", str(found.pgdata)], check=True)
    attach.start_cluster(found.config)


def rows(found: ProtectedSet) -> list[tuple[int, int]]:
    """(inserted, deleted) of each transaction that is listed for table t, oldest first."""
    told: list[dict[str, Any]] = api.log(found.name, table="t", limit=100)["transactions"]
    return [(each["tables"][0]["inserted"], each["tables"][0]["deleted"]) for each in reversed(told)]


def test_transactions_behind_a_cold_copy_are_listed(make_set: MakeSet, binaries_of: BindirOf) -> None:
    allowed = [r"transactions cannot be listed: the WAL went back", r"the WAL is read anew.*the WAL went back"]
    found = make_set(binaries_of(15), settings={"autovacuum": "off"}, allowed=allowed)
    found.sql("create table t (id int)")
    api.cut(found.name)
    attach.stop_cluster(found.config)
    copy = found.root / "cold"
    subprocess.run(["cp", "-a", f"{found.pgdata}/.", str(copy)], check=True)
    attach.start_cluster(found.config)
    found.sql("insert into t select generate_series(1, 100000)")
    api.cut(found.name)
    put_in_place(found, copy)
    for n in range(5):
        found.sql(f"insert into t values ({n})")
    gap = api.cut(found.name)["number"]
    found.sql("delete from t where id = 1")
    expected = [(0, 0), (100_000, 0), (0, 1)]
    for _ in range(2):
        assert api.log(found.name)["unknown"] == [gap]
        assert rows(found) == expected
        assert api.find(found.name, "delete from t")["total"] == 1
        api.cut(found.name)
    xid = api.find(found.name, "delete from t")["transactions"][0]["xid"]
    with found.running_at(Target("xid", xid, exclusive=True)) as box, box.connect() as session:
        assert session.execute("select count(*) from t").fetchall() == [(5,)]


def test_a_state_that_is_out_of_step_is_left_for_the_boundary(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """No record follows the one that it names: nothing would be found with it."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"}, allowed=[r"the WAL is read anew.*was not found"])
    found.sql("create table t (id int)")
    first = api.cut(found.name)["number"]
    found.sql("insert into t values (1)")
    api.cut(found.name)
    kept = found.store / "intervals" / f"{first + 1:010d}" / "wal.state"
    raw = bytearray(kept.read_bytes())
    raw[48] ^= 8  # the LSN of its newest record, which the next one names
    raw[40:48] = bytes(8)
    raw[40:48] = xxhash.xxh3_64_intdigest(bytes(raw)).to_bytes(8, "little")
    kept.write_bytes(raw)
    found.sql("insert into t select generate_series(1, 7)")
    api.cut(found.name)
    assert api.log(found.name)["unknown"] == []
    assert rows(found)[-1] == (7, 0)


def test_without_a_state_reading_begins_behind_the_boundary(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The journal may hold older writes, and lack some between them and the boundary."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    found.sql("create table t (id int)")
    number = api.cut(found.name)["number"]
    found.sql("insert into t values (1)")
    upto = found.durable()
    store = Store.open(found.store)
    (store.interval(number) / "wal.state").unlink()
    boundary = Bundle.open(store, number).interval.boundary
    start = Start.of(store, boundary, {}, int(found.config.cluster.system_identifier))
    readout = start.read([], tables=found.root / "tables", journal=found.config.journal, upto=upto)
    assert len(readout.ends)
    assert readout.wal["write"].min() > boundary.write
