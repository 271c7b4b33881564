"""The write that a commit is said to be in is the first one with which recovery keeps it; one fewer loses it."""

from __future__ import annotations

import random

import pytest

from pgcdp.intervals.indexing import Start
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Target
from pgcdp.recovery import sandbox
from pgcdp.recovery.scratch import mounted
from tests.cluster.test_postgres_truth import ALLOWED, SETTINGS
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet
from tests.load import Load
from tests.moments import scratch_below
from tests.results import keep_result

BARE = {"wal_init_zero": "off", "wal_recycle": "off", "max_wal_size": "64MB", "min_wal_size": "32MB"}
"""A new WAL segment is a hole: what the filesystem notes of it comes behind the data."""
BARE_ROWS = {"settings": [{"name": "wal_init_zero", "setting": "off"}]}
"""The one of them that an index goes by."""


def kept(found: ProtectedSet, write: int, xids: list[int]) -> list[bool]:
    """Whether each of the transactions is committed at a write."""
    source = found.source()
    point = source.resolve(Target("write", write))
    question = """select case when x < pg_snapshot_xmax(pg_current_snapshot())::text::bigint
        then pg_xact_status(x::text::xid8) = 'committed' else false end from unnest(%s::bigint[]) x"""
    with mounted(source, point, scratch_below(found.root)) as pgdata:
        box = sandbox.start(pgdata, source.settings(point), parent=pgdata.parent, binaries=found.binaries)
        with box, box.connect() as connection:
            return [bool(row[0]) for row in connection.execute(question, [xids]).fetchall()]


def run_commits(found: ProtectedSet, count: int, commits: int, seed: int) -> list[dict[str, object]]:
    """Load, then so many random commits looked at in the write that is said, and in the one before it."""
    rng = random.Random(seed)
    load = Load(found.address(), found.binaries, postgres_user(), clients=4, ledgers=4, scale=2)
    load.prepare()
    begin = found.durable()
    load.start()
    load.wait_for(commits)
    result = load.stop()
    assert not result.failures
    found.durable()
    history = found.source().transactions().history()
    ends = [end for _, chapter in history.newest_first() for end in chapter.ends[:]]
    good = [end for end in ends if end["status"] in (1, 4) and int(end["write"]) > begin]
    late = [end for end in good if end["late"]]
    chosen = [rng.choice(late if late and number % 2 else good) for number in range(count)]
    rows: list[dict[str, object]] = []
    for end in chosen:
        write, xid = int(end["write"]), int(end["xid"])
        assert kept(found, write, [xid]) == [True], f"xid {xid} is not there with write {write}"
        assert kept(found, write - 1, [xid]) == [False], f"xid {xid} is there with write {write - 1}"
        rows.append({"xid": xid, "write": write, "late": int(end["late"])})
    return rows


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_an_interval_may_end_while_wal_waits_for_the_filesystem(
    make_set: MakeSet, binaries_of: BindirOf, fs: str
) -> None:
    found = make_set(binaries_of(15), fs=fs, settings={**SETTINGS, **BARE}, allowed=ALLOWED)
    found.sql("create table t as select n from generate_series(1, 3000) n")
    found.sql("select pg_switch_wal()")  # what initdb made is no hole
    for _ in range(40):
        found.sql("insert into t select n from generate_series(1, 200) n")
    durable = found.durable()
    source = found.source()
    assert source.journal is not None
    start = Start.of(source.store, source.base(), BARE_ROWS, int(source.store.extra["cluster"]["system_identifier"]))

    def read(upto: int, settle_upto: int) -> dict[int, int]:
        """By where WAL begins: the write with which it is durable."""
        place = found.config.journal
        rows = start.read([], tables=found.root / "tables", journal=place, upto=upto, settle_upto=settle_upto).wal
        return {int(row["from_lsn"]): int(row["durable"]) for row in rows}

    rows = start.read([], tables=found.root / "tables", journal=found.config.journal, upto=durable).wal
    late = [row for row in rows if row["durable"] > row["write"]][-20:]
    assert len(late) == 20
    for row in late:
        held, then, lsn = int(row["write"]), int(row["durable"]), int(row["from_lsn"])
        assert read(held, durable)[lsn] == then
        assert read(held, then)[lsn] == then
        assert read(held, then - 1)[lsn] == held, "it cannot be known yet"


@pytest.mark.parametrize("bare", [False, True], ids=["zeroed", "bare"])
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_commit_is_there_with_its_write_and_not_before(
    make_set: MakeSet, binaries_of: BindirOf, fs: str, bare: bool
) -> None:
    found = make_set(binaries_of(15), fs=fs, settings={**SETTINGS, **(BARE if bare else {})}, allowed=ALLOWED)
    assert len(run_commits(found, 4, 600, seed=3)) == 4


@pytest.mark.soak
@pytest.mark.parametrize("bare", [False, True], ids=["zeroed", "bare"])
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_many_commits_are_there_with_their_writes(
    make_set: MakeSet, pg_binaries: Binaries, fs: str, bare: bool
) -> None:
    found = make_set(pg_binaries, fs=fs, settings={**SETTINGS, **(BARE if bare else {})}, allowed=ALLOWED)
    rows = run_commits(found, 42, 5000, seed=pg_binaries.major)
    keep_result(f"first-write-pg{pg_binaries.major}-{fs}-{'bare' if bare else 'zeroed'}", rows)
