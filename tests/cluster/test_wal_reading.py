"""The engine's reading of WAL inside captured writes, against pg_waldump of the cluster's own WAL."""

from __future__ import annotations

import os
import random
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from pgcdp import api
from pgcdp.capture import attach
from pgcdp.capture.engine import find_engine
from pgcdp.intervals.indexing import Start
from pgcdp.intervals.readout import Readout
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import BLOCK, END, Target
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import FrameWriter
from pgcdp.store.layout import Store
from pgcdp.units import format_lsn, parse_lsn
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet
from tests.results import keep_result
from tests.waiting import wait_until

MAGIC_15 = b"\x10\xd1"
"""How a WAL page of PostgreSQL 15 begins."""
POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
LINE = re.compile(r"^rmgr: (\w+) .*?tx:\s+(\d+), lsn: ([0-9A-F/]+), prev [0-9A-F/]+, desc: (.*)$")
ENDS = {
    "COMMIT": "committed",
    "ABORT": "aborted",
    "PREPARE": "prepared",
    "COMMIT_PREPARED": "committed prepared",
    "ABORT_PREPARED": "aborted prepared",
}
Changes = dict[str, Counter[str]]


@dataclass
class End:
    """One end of a transaction, as both sides tell it."""

    lsn: int
    status: str
    xid: int
    time: str
    subxids: list[int]
    changes: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)


ROWS = ("inserted", "updated", "deleted", "moved")


def row_change(description: str) -> dict[str, int]:
    """What a heap record does to rows: {"inserted": 1}; "moved" are those that an UPDATE deleted from a partition."""
    word = description.split()[0].removesuffix("+INIT")
    flags = int(found[1], 16) if (found := re.search(r"flags:? 0x([0-9A-Fa-f]+)", description)) else 0
    if word == "MULTI_INSERT":
        count = re.match(r"\S+ (?:ntuples: )?(\d+)", description)
        assert count is not None, description
        return {"inserted": int(count[1])}
    if word == "HEAP_CONFIRM" or (word == "INSERT" and not flags & 4):
        return {"inserted": 1}
    if word == "DELETE" and not flags & 8:
        return {"deleted": 1, "moved": 1} if flags & 16 else {"deleted": 1}
    return {"updated": 1} if word in ("UPDATE", "HOT_UPDATE") else {}


def waldump(binaries: Binaries, wal: Path, begin: int, end: int) -> Iterator[End]:
    """Ends of transactions in pg_waldump's listing, with the rows that pg_waldump shows for them."""
    command = [str(binaries.path("pg_waldump")), "-p", str(wal), "-s", format_lsn(begin), "-e", format_lsn(end)]
    for lsn in (begin, end - 1):  # named, else it may learn the size of segments from one that is still empty
        high, low = divmod(lsn >> 24, 256)
        command.append(f"{1:08X}{high:08X}{low:08X}")
    ran = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    )
    assert ran.returncode == 0, ran.stderr
    listed = ran.stdout
    rows: defaultdict[int, Changes] = defaultdict(lambda: defaultdict(Counter))
    for match in filter(None, map(LINE.match, listed.splitlines())):
        manager, xid, lsn, description = match[1], int(match[2]), parse_lsn(match[3]), match[4]
        if manager in ("Heap", "Heap2"):
            change, relation = row_change(description), re.search(r"blkref #0: rel (\d+/\d+/\d+)", description)
            if change and relation is not None and xid:
                rows[xid][relation[1]].update(change)
        word = description.split()[0]
        if manager != "Transaction" or word not in ENDS:
            continue
        named = re.match(r"\w+ (?:gid \S+: |(\d+): )?(\d{4}-\d\d-\d\d \S+) UTC", description)
        assert named is not None, description
        subs = re.search(r"subxacts: ([\d ]+)", description)
        dropped = re.search(r"; rels: ([^;]+)", description)
        done = End(
            lsn, ENDS[word], int(named[1] or xid), named[2], [int(each) for each in subs[1].split()] if subs else []
        )
        merged: Changes = defaultdict(Counter)
        for each in (done.xid, *done.subxids):
            for relation_name, counts in rows[each].items():
                merged[relation_name].update(counts)
            if done.status != "prepared":
                rows.pop(each)
        done.changes = {name: dict(counts) for name, counts in merged.items()}
        done.dropped = {name.replace("base/", "1663/") for name in dropped[1].split()} if dropped else set()
        yield done


def listing(found: ProtectedSet, begin: int) -> list[End]:
    """The same by the engine over the store's intervals, one after another, each from what the one before left."""
    ends: list[End] = []
    for number in range(1, len(list((found.store / "intervals").iterdir())) + 1):
        store = Store.open(found.store)
        before = Bundle.open(store, number - 1).interval.boundary if number > 1 else store.baseline
        assert before is not None
        start = Start.of(store, before, {}, int(found.config.cluster.system_identifier))
        ends += ends_of(start.read([store.interval(number)], tables=found.root / "tables"))
    return [end for end in ends if end.lsn >= begin]


def ends_of(readout: Readout) -> Iterator[End]:
    """The ends in the engine's tables."""
    change_at = subxid_at = write = 0
    for row in readout.ends:
        assert row["write"] >= write
        write = row["write"]
        at = datetime.fromtimestamp(POSTGRES_EPOCH.timestamp() + int(row["time_us"]) // 10**6, UTC)
        subxids = readout.subxids[subxid_at : subxid_at + row["subxids"]].tolist()
        subxid_at += int(row["subxids"])
        end = End(
            int(row["lsn"]),
            list(ENDS.values())[int(row["status"]) - 1],
            int(row["xid"]),
            f"{at:%Y-%m-%d %H:%M:%S}.{int(row['time_us']) % 10**6:06}",
            subxids,
        )
        for change in readout.changes[change_at : change_at + row["changes"]]:
            file = "/".join(str(change[name]) for name in ("tablespace", "database", "file"))
            counts = {name: int(change[name]) for name in ROWS if change[name]}
            if counts:
                end.changes[file] = counts
            if change["flags"] & 2:
                end.dropped.add(file)
        change_at += int(row["changes"])
        yield end


def work(found: ProtectedSet, *, initialize: bool = True) -> None:
    """A little of everything that a WAL reader can stumble over."""
    if initialize:
        found.pgbench("-i", "-q", "-s", "1")
        found.pgbench("-n", "-c", "8", "-t", "100")
    with found.connect() as session:
        session.execute("create table t (id int primary key, body text)")
        session.execute("alter table t alter body set storage external")
        session.execute("create table parts (id int, at int) partition by range (at)")
        session.execute("create table low partition of parts for values from (0) to (50)")
        session.execute("create table high partition of parts for values from (50) to (100)")
        with session.cursor().copy("copy t from stdin") as copy:
            for number in range(5000):
                copy.write_row((number, "x" * (number % 700)))
        session.execute("insert into t select n, repeat(md5(n::text), 400) from generate_series(10000, 10050) n")
        session.execute("insert into t values (1, 'again') on conflict (id) do update set body = excluded.body")
        session.execute("insert into t values (20000, 'new') on conflict (id) do nothing")
        session.execute("insert into parts select n, n % 100 from generate_series(1, 1000) n")
        session.execute("update parts set at = 99 - at where id < 100")
        session.execute("delete from t where id % 7 = 0")
        session.execute("vacuum full t")
        session.execute("cluster t using t_pkey")
        session.execute("create table gone as select generate_series(1, 100) as n")
        session.execute("truncate gone")
        session.execute("drop table gone")
        session.execute(
            "begin; insert into t values (30000, 'a'); savepoint one; update t set body = 'b' where id < 20"
        )
        session.execute("rollback to one; savepoint two; delete from t where id < 5; release two; commit")
        session.execute("begin; delete from t; rollback")
        session.execute("do $$ begin for i in 1..150 loop begin insert into parts values (i, 1);"
                        " exception when others then null; end; end loop; end $$")  # fmt: skip
        for name, end in (("first", "commit"), ("second", "rollback")):
            session.execute(
                f"begin; savepoint s; insert into parts values (1, 2); release s; prepare transaction '{name}'"
            )
            session.execute(f"{end} prepared '{name}'")
        session.execute("set synchronous_commit = off")
        session.execute("do $$ begin for i in 1..500 loop insert into parts values (i, 3); commit; end loop; end $$")
        session.execute("select pg_switch_wal()")
        session.execute("insert into parts values (1, 4)")
        session.execute("set synchronous_commit = on")
        session.execute("insert into parts values (1, 5)")


def huge(found: ProtectedSet, rows: int) -> None:
    """Transactions of many records, with more subtransactions than a backend keeps in memory (64), in both outcomes."""
    with found.connect() as session:
        session.execute("create table huge (id int, body text)")
        for end in ("rollback", "commit"):
            session.execute("begin")
            session.execute(
                f"insert into huge select n, repeat('x', n % 500) from generate_series(1, {rows}) n".encode()
            )
            session.execute("do $$ begin for i in 1..300 loop begin update huge set id = -id where id = i;"
                            " if i % 3 = 0 then raise exception 'no'; end if; exception when others then null; end;"
                            " end loop; end $$")  # fmt: skip
            session.execute(f"delete from huge where id % 5 = 0; {end}".encode())


def compare(found: ProtectedSet, begin: int, end: int) -> list[End]:
    """Every end of a transaction between two LSNs, the same by pg_waldump and by the engine."""
    expected = list(waldump(found.binaries, found.pgdata / "pg_wal", begin, end))
    got = [each for each in listing(found, begin) if each.lsn < end]
    assert [each.lsn for each in got] == [each.lsn for each in expected]
    for one, other in zip(got, expected, strict=True):
        assert one == other
    return expected


@pytest.mark.parametrize("version", [15, 17, 18])
@pytest.mark.parametrize("level", ["replica", "logical"])
def test_transactions_are_those_of_pg_waldump(
    make_set: MakeSet, binaries_of: BindirOf, version: int, level: str
) -> None:
    settings = {"max_prepared_transactions": "4", "wal_keep_size": "1GB", "autovacuum": "off", "wal_level": level}
    found = make_set(binaries_of(version), settings=settings, allowed=[r"logical decoding|starting point"])
    begin = parse_lsn(found.sql("select pg_current_wal_insert_lsn()")[0][0])
    if level == "logical":
        found.sql("select pg_create_logical_replication_slot('decoding', 'test_decoding')")
    work(found)
    huge(found, 20_000)
    if level == "logical":
        changes = found.sql("select count(*) from pg_logical_slot_get_changes('decoding', null, null)")
        assert changes[0][0] > 20_000
    end = parse_lsn(api.cut(found.name)["redo_lsn"])
    assert {each.status for each in compare(found, begin, end)} == set(ENDS.values())


@pytest.mark.soak
def test_long_workloads_are_those_of_pg_waldump(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """All of it at once and again and again, over many intervals, with autovacuum."""
    settings = {
        "max_prepared_transactions": "4",
        "wal_keep_size": "8GB",
        "wal_level": "logical",
        "max_wal_size": "256MB",
    }
    allowed = [
        r"canceling autovacuum task",
        r"logical decoding|starting point",
        r"checkpoints are occurring too frequently",
    ]
    found = make_set(pg_binaries, settings=settings, allowed=allowed, size=12 << 30, cut=("10s",))
    begin = parse_lsn(found.sql("select pg_current_wal_insert_lsn()")[0][0])
    found.pgbench("-i", "-q", "-s", "5")
    for seed in range(4):
        load = subprocess.Popen(
            found.program("pgbench", "-n", "-c", "8", "-T", "40", f"--random-seed={seed}", "postgres"),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        work(found, initialize=False)
        huge(found, 300_000)
        assert load.wait() == 0
        found.sql("drop table t, parts, huge")
    end = parse_lsn(api.cut(found.name)["redo_lsn"])
    expected = compare(found, begin, end)
    counts = Counter(each.status for each in expected)
    assert set(counts) == set(ENDS.values())
    rows = sum(sum(change.values()) for each in expected for change in each.changes.values())
    told = {"wal_bytes": end - begin, "rows": rows, "intervals": len(api.info(found.name)["intervals"]), **counts}
    keep_result(f"waldump-pg{pg_binaries.major}", told)


def restart_on_a_new_timeline(found: ProtectedSet) -> None:
    """An archive recovery to the end of the cluster's own WAL."""
    attach.stop_cluster(found.config)
    user = postgres_user()
    signal_file = found.pgdata / "recovery.signal"
    signal_file.touch()
    os.chown(signal_file, user.uid, user.gid)
    attach.start_cluster(found.config)
    wait_until(lambda: found.sql("select pg_is_in_recovery()") == [(False,)], what="the end of recovery")


def test_transactions_of_a_new_timeline_follow_those_before(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The new timeline begins with a copy of the segment that the old one ended in."""
    found = make_set(binaries_of(15), settings={"autovacuum": "off", "restore_command": "false"})
    found.sql("create table t (id int)")
    xids = []
    for number in range(6):
        with found.connect() as session:
            session.execute(f"begin; insert into t values ({number})".encode())
            xids.append(session.execute("select pg_current_xact_id()::text::bigint").fetchall()[0][0])
            session.execute("commit")
        if number == 2:
            restart_on_a_new_timeline(found)
        if number == 4:
            restart_on_a_new_timeline(found)
            api.cut(found.name)
    for _ in range(2):
        told = [
            each for each in reversed(api.log(found.name, table="t")["transactions"]) if each["tables"][0]["inserted"]
        ]
        assert [each["xid"] for each in told] == xids
        assert [each["timeline"] for each in told] == [1, 1, 1, 2, 2, 3]
        api.cut(found.name)
    for place, xid in enumerate(xids):
        for exclusive in (True, False):
            source = found.source()
            point = source.resolve(Target("xid", xid, exclusive=exclusive))
            with found.running_at(point) as box, box.connect() as session:
                rows = session.execute("select array_agg(id order by id) from t").fetchall()
                assert (rows[0][0] or []) == list(range(place + (not exclusive)))


def damaged_copy(found: ProtectedSet, number: int, place: Path, rng: random.Random) -> None:
    """An interval's writes and index again, with bits of its WAL pages flipped and all our own checksums right."""
    bundle = Bundle.open(Store.open(found.store), number)
    index = bundle.index()
    with bundle.writes() as reader:
        writes = bytearray(reader.read_stream())
    pages = [at for at in range(0, len(writes), BLOCK) if writes[at : at + 2] == MAGIC_15]
    for _ in range(20):
        writes[rng.choice(pages) + rng.randrange(24, BLOCK)] ^= 1 << rng.randrange(8)
    place.mkdir()
    for name, content, raw in (("writes", b"WRIT", bytes(writes)), ("index", b"INDX", index.tobytes())):
        writer = FrameWriter.create(place / name, content, found.config.set_id_bytes, number)
        writer.append(raw)
        writer.finish()


def test_damaged_wal_never_becomes_a_transaction(make_set: MakeSet, binaries_of: BindirOf, tmp_path: Path) -> None:
    found = make_set(binaries_of(15), settings={"autovacuum": "off"})
    found.pgbench("-i", "-q", "-s", "1")
    api.cut(found.name)
    found.pgbench("-n", "-c", "4", "-t", "100")
    number = api.cut(found.name)["number"]

    def ends(program: str, interval: Path) -> list[bytes]:
        identifier = str(found.config.cluster.system_identifier)
        with tempfile.TemporaryDirectory(dir=tmp_path) as out:
            command = [program, "wal", "--system-identifier", identifier, "--out", out, str(interval)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            table = np.fromfile(Path(out, "ends"), dtype=END)
        for name in ("write", "begin_at", "end_at"):
            table[name] = 0
        return [row.tobytes() for row in table]

    programs = [str(find_engine()), *filter(None, [os.environ.get("PGCDP_ENGINE_ASAN")])]
    whole = ends(programs[0], found.store / "intervals" / f"{number:010}")
    assert len(whole) >= 400
    fewer = 0
    for seed in range(20):
        place = tmp_path / str(seed)
        damaged_copy(found, number, place, random.Random(seed))
        for program in programs:
            got = ends(program, place)
            assert got == whole[: len(got)]
            fewer += len(got) < len(whole)
    assert fewer
