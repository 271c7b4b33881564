"""What a write is said to hold is what the filesystem's own tools say of its blocks, and what its bytes are."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from pgcdp import api
from pgcdp.records import BLOCK, Kind
from pgcdp.recovery.holds import kind_of, owners_in
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.moments import log_ranges

PAGES = 8192 // BLOCK


def blocks_of(found: ProtectedSet, path: str, device: str) -> dict[int, int]:
    """Block of the volume to block of the file, by debugfs or xfs_bmap."""
    place: dict[int, int] = {}
    if found.fs == "ext4":
        out = subprocess.run(["debugfs", "-R", f"stat /{path}", device], check=True, capture_output=True, text=True)
        for at, first, last in re.findall(r"\((\d+)(?:-\d+)?\):(\d+)(?:-(\d+))?", out.stdout.split("EXTENTS:")[1]):
            place |= {block: int(at) + block - int(first) for block in range(int(first), int(last or first) + 1)}
        return place
    out = subprocess.run(["xfs_bmap", str(found.pgdata / path)], check=True, capture_output=True, text=True)
    for at, _, first, last in re.findall(r"\[(\d+)\.\.(\d+)\]: (\d+)\.\.(\d+)", out.stdout):
        begin = int(first) // 8
        place |= {block: int(at) // 8 + block - begin for block in range(begin, (int(last) + 1) // 8)}
    return place


def told(found: ProtectedSet, number: int) -> list[tuple[Any, list[dict[str, Any]]]]:
    """(record, owners) of each data write of an interval."""
    store = Store.open(found.store)
    index = Bundle.open(store, number).index()
    rows = index[index["kind"] == Kind.WRITE]
    return [(row, owners_in(store, number, row)) for row in rows]


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_blocks_bear_the_names_of_their_files(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    found = make_set(binaries_of(15), fs=fs, settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("create schema s")
        session.execute("create table s.t (id int primary key, body text)")
        session.execute("insert into s.t select n, repeat(md5(n::text), 20) from generate_series(1, 3000) n")
        session.execute("create table gone as select * from s.t")
    api.cut(found.name)
    with found.connect() as session:
        session.execute("update s.t set body = body || 'x' where id % 3 = 0")
        session.execute("alter table s.t rename to renamed")
        session.execute("drop table gone")
        path = session.execute("select pg_relation_filepath('s.renamed')").fetchone()
    assert path is not None
    number = api.cut(found.name)["number"]
    device = found.status()["volumes"][0]["device"]
    table, log = blocks_of(found, path[0], device), log_ranges(device, fs)
    pages, logged, controls = 0, 0, 0
    for record, owners in told(found, number):
        first, offset = int(record["offset"]) // BLOCK, int(record["offset"])
        mine: list[int] = []
        for each in owners:
            if each["file"] == path[0] and not each["earlier"]:
                assert each["relation"] == {
                    "database": "postgres", "schema": "s", "name": "renamed", "kind": "r", "fork": "main",
                    "page": each["offset"] // 8192, "pages": max(1, each["length"] // 8192),
                }  # fmt: skip
                at = each["offset"] // BLOCK
                mine += range(at, at + each["length"] // BLOCK)
        expected = [table[block] for block in range(first, first + int(record["length"]) // BLOCK) if block in table]
        assert sorted(mine) == sorted(expected)
        pages += len(expected) // PAGES
        if any(begin <= offset < end for begin, end in log):
            logged += 1
            assert kind_of({"files": owners}) == "filesystem"
        controls += any(each["file"] == "global/pg_control" for each in owners)
    assert pages > 200
    assert logged > 0
    assert controls > 0


def test_a_write_is_shown_with_what_it_holds(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    with found.connect() as session:
        session.execute("create table t as select n from generate_series(1, 20000) n")
        session.execute("checkpoint")
    last = found.durable()
    opened = [api.show(found.name, write)["holds"] for write in range(last - 60, last + 1)]
    assert {each["what"] for each in opened} >= {"wal", "relation", "pg_control"}
    named = [owner["relation"]["name"] for each in opened for owner in each["files"] if owner["relation"]]
    assert "t" in named
    api.cut(found.name)
    stored = [api.show(found.name, write)["holds"] for write in range(last - 60, last + 1)]
    assert [each["what"] for each in stored] == [each["what"] for each in opened]
