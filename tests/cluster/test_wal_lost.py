"""No transaction is missing from the lists without a word, though a boundary cuts through the record that ends it."""

from __future__ import annotations

import re
import subprocess
import threading

import pytest

from pgcdp import api
from pgcdp.errors import TargetError
from pgcdp.records import Target
from pgcdp.units import format_lsn, parse_lsn
from tests.cluster.test_wal_reading import ENDS, LINE
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet

HOLE = re.compile(r"WAL ([0-9A-F]+/[0-9A-F]+) to ([0-9A-F]+/[0-9A-F]+) in interval (\d+) was not seen whole")
TRIED = 60
LONG_RECORD = "select pg_logical_emit_message(true, 'long', repeat('x', 1000000))"


def write_long_records(found: ProtectedSet, stop: threading.Event) -> None:
    with found.connect() as session:
        while not stop.is_set():
            session.execute(LONG_RECORD)


def ends_by_waldump(found: ProtectedSet, begin: int, end: int) -> set[int]:
    """LSNs of all records of transactions that ended."""
    command = [str(found.binaries.path("pg_waldump")), "-p", str(found.pgdata / "pg_wal"), "-r", "Transaction"]
    command += ["-s", format_lsn(begin), "-e", format_lsn(end)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = filter(None, map(LINE.match, listed.splitlines()))
    return {parse_lsn(line[3]) for line in lines if line[4].split()[0] in ENDS}


def within(lsn: int, holes: list[tuple[int, int]]) -> bool:
    return any(first <= lsn < last for first, last in holes)


def cut_and_forget(found: ProtectedSet) -> None:
    """A boundary, whose interval does not leave what was read: the next one is read from its first page on."""
    number = int(api.cut(found.name)["number"])
    (found.store / "intervals" / f"{number:010d}" / "wal.state").unlink()


def test_what_was_not_seen_is_said(make_set: MakeSet, binaries_of: BindirOf) -> None:
    settings = {"autovacuum": "off", "wal_keep_size": "2GB", "max_wal_size": "2GB"}
    found = make_set(binaries_of(15), settings=settings, size=4 << 30, allowed=[r"WAL .* was not seen whole"])
    found.sql("create table t (id int)")
    begin = parse_lsn(found.sql("select pg_current_wal_insert_lsn()")[0][0])
    stop = threading.Event()
    work = [threading.Thread(target=write_long_records, args=(found, stop)) for _ in range(8)]
    for each in work:
        each.start()
    try:
        for _ in range(TRIED):
            cut_and_forget(found)
            if api.log(found.name, limit=1)["unseen"]:
                break
    finally:
        stop.set()
        for each in work:
            each.join()
    end = parse_lsn(api.cut(found.name)["redo_lsn"])
    told = api.log(found.name, limit=None)
    assert told["unseen"], f"none in {TRIED} boundaries"
    holes = [(parse_lsn(one), parse_lsn(other)) for one, other, _ in HOLE.findall(told["unseen"])]
    assert told["unknown"] == sorted({int(number) for _, _, number in HOLE.findall(told["unseen"])})
    listed = {parse_lsn(each["lsn"]) for each in told["transactions"]}
    ends = ends_by_waldump(found, begin, end)
    assert len(ends) > 20
    assert {lsn for lsn in ends - listed if not within(lsn, holes)} == set()
    assert {lsn for lsn in listed if within(lsn, holes)} == set(), "what was read is not called lost"
    with pytest.raises(TargetError, match=HOLE):
        api.resolve(found.name, Target("newest"), before="insert into t values (1)")
    with pytest.raises(TargetError, match=HOLE):
        api.resolve(found.name, Target("lsn", holes[0][0]))
    with pytest.raises(TargetError, match="no transaction 77777777 ended") as raised:
        api.resolve(found.name, Target("xid", 77_777_777))
    assert HOLE.search(raised.value.hint or "")
