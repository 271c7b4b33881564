"""Reading WAL for the index has an end, whatever the engine meets, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import random
import struct
import threading
from pathlib import Path

import pytest

from pgcdp.intervals import readout
from pgcdp.intervals.indexing import Start, index_interval
from pgcdp.intervals.readout import Cluster
from pgcdp.intervals.transactions import Past
from pgcdp.postgres.wal import Manager, Note, first_notes, pack_notes
from pgcdp.store.bundle import IndexFiles
from tests.unit.test_increments import boundary, capture, fill, make_world, random_op
from tests.waiting import wait_until


@pytest.mark.parametrize("hangs", ["writes", "state"])
def test_an_engine_that_does_not_end_keeps_no_interval_from_the_store(
    hangs: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a pipe that nobody writes to. Its tables are in the store's room for what is being built."""
    monkeypatch.setattr(readout, "FLOOR_SECONDS", 3.0)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    chooser = random.Random(1)
    world = make_world(tmp_path)
    capture(world, [random_op(chooser) for _ in range(10)], chooser)
    opened = fill(world, 1, 10)
    opened.finish()
    if hangs == "writes":
        (opened.path / "writes").unlink()
    pipe = opened.path / hangs
    os.mkfifo(pipe)
    state = pipe if hangs == "state" else None
    tables = world.store.path / "incoming" / "0000000001.wal"
    tables.mkdir()
    (tables / "ends").write_bytes(b"of a killed agent")
    start = Start(world.store, Cluster(1), boundary(0, 0), state, Past())
    indexed: list[IndexFiles | None] = []
    with caplog.at_level(logging.INFO):
        thread = threading.Thread(target=lambda: indexed.append(index_interval(opened, boundary(1, 10), lambda: start)))
        thread.start()
        if hangs == "writes":
            wait_until(lambda: (tables / "running").exists(), what="the engine's tables")
        thread.join(60)
    assert indexed == [None]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "its transactions cannot be listed: reading the WAL in" in said
    assert "more than 3 s" in said
    assert not tables.exists()
    opened.close()


def change(lsn: int, database: int, manager: Manager = Manager.HEAP) -> Note:
    """A record that changes a page of a database's catalog, or (0) of a shared one."""
    block = bytes([0, 0]) + struct.pack("<H", 0) + struct.pack("<IIII", 1663 if database else 1664, database, 1259, 0)
    return Note(lsn, lsn + 8, 1, 0, 8, 1, 700, 0xD110, manager, 0, block + bytes([255, 0]))


def test_only_the_first_records_about_names_are_taken() -> None:
    """What is needed for exact points (shared catalogs, checkpoints, marks) is not among what is left out."""
    other = Note(9, 9, 1, 0, 8, 1, 0, 0xD110, Manager.MARK, 0, b"mark")
    notes = [change(1, 5), change(2, 5), change(3, 5, Manager.HEAP2), change(4, 0), change(5, 6, Manager.XLOG), other]
    packed = pack_notes(notes)
    assert first_notes(packed, 6) == (notes, 0)
    kept, left_out = first_notes(packed, 2)
    assert [note.lsn for note in kept] == [1, 2, 4, 9]
    assert left_out == 2
