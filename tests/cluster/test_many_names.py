"""More changes of catalogs than are taken: no name is made up, and exact points stay exact."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from pgcdp import api
from pgcdp.cli.log import render
from pgcdp.intervals import indexing, readout
from pgcdp.intervals.indexing import Start, index_interval
from pgcdp.postgres.wal import of_database, read_notes
from pgcdp.store.bundle import Bundle
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet

LIMIT = 8


def test_what_is_left_out_behind_the_last_boundary_is_said(
    make_set: MakeSet, binaries_of: BindirOf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    for number in range(1, 20):
        found.sql(f"create table t{number} (id int)")
    assert api.log(found.name)["left_out"] == 0
    monkeypatch.setattr(readout, "NOTES", LIMIT)
    for told in (api.log(found.name), api.find(found.name, "create table t1 ()")):
        assert told["left_out"] > 0
        render(told)
        assert f"{told['left_out']} records about names of tables were left out" in capsys.readouterr().err
    api.cut(found.name)
    assert api.log(found.name)["left_out"] == 0


def test_the_temporary_directory_need_not_hold_what_is_read(
    make_set: MakeSet, binaries_of: BindirOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    found.sql("create table t (id int)")
    found.sql("do $$ begin for n in 1..3000 loop insert into t values (n); commit; end loop; end $$")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert api.log(found.name, table="t")["total"] == 3001
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_is_left_out_is_said_and_not_gone_on_from(
    make_set: MakeSet, binaries_of: BindirOf, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    found.sql("create database doomed")
    api.cut(found.name)
    found.sql("drop database doomed")  # its checkpoint ends an interval
    with found.connect() as running:
        found.sql("create table t0 (id int)")
        running.execute("begin; create table open (id int)")  # what it did is handed to the next interval
        for number in range(1, 20):
            found.sql(f"create table t{number} (id int)")
        number = api.cut(found.name)["number"]
        running.execute("commit")
    shutil.copytree(found.store, tmp_path / "store", ignore=shutil.ignore_patterns("image", ".*.new"))
    store = Store.open(tmp_path / "store")
    bundle = Bundle.open(store, number)
    before = Bundle.open(store, number - 1).interval.boundary
    expected = [each for each in indexing.read_events(bundle.path)["events"] if each["kind"] == "drop_database"]
    assert expected[0]["first"]["lsn"] < expected[0]["lsn"]
    shutil.copytree(bundle.path, store.incoming(number))
    (store.incoming(number) / "relations.parquet").unlink()
    opened = OpenInterval.open(store, number, bundle.interval.from_write, durable_write=bundle.interval.to_write)

    def begin() -> Start:
        return Start.of(store, before, bundle.settings(), int(found.config.cluster.system_identifier))

    kept = {}
    for limit in (LIMIT, readout.NOTES):
        monkeypatch.setattr(readout, "NOTES", limit)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert index_interval(opened, bundle.interval.boundary, begin) is not None
        said = [record.getMessage() for record in caplog.records]
        assert bool(said) == (limit == LIMIT)
        assert all("more not: names may be missing" in line for line in said)
        events = indexing.read_events(opened.path)
        assert [each for each in events["events"] if each["kind"] == "drop_database"] == expected
        names = {table["name"] for table in events["tables"]}
        assert ("t0" in names, "t19" in names) == (True, limit > LIMIT)
        kept[limit] = [of_database(note) for note in read_notes((opened.path / "catalog.notes").read_bytes())]
    assert any(kept[readout.NOTES])
    assert not any(kept[LIMIT])
    assert kept[LIMIT]
    opened.close()
