"""A recovery point opened in place is, byte for byte, the one that a restore copies; and Postgres runs on it."""

from __future__ import annotations

import random
import re
import shutil
import tempfile
from pathlib import Path

import psycopg
import pytest

from pgcdp import api
from pgcdp.errors import DamageError
from pgcdp.opening import scratch_place
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import BLOCK, RecoveryPoint, Span, Target
from pgcdp.recovery import restore
from pgcdp.recovery.merged import known
from pgcdp.recovery.salvage import Wanted
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import shown
from pgcdp.store.frames import FrameReader
from pgcdp.store.image import read_state
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet, assert_equal, cutting
from tests.flipping import flipped
from tests.load import ALLOWED, Load
from tests.waiting import wait_until

SETTINGS = {"max_wal_size": "64MB", "shared_buffers": "32MB", "max_prepared_transactions": "10"}
NOISE = [*ALLOWED, r"checkpoints are occurring too frequently", r"terminating connection", r"unexpected EOF"]


def wait_for_image(found: ProtectedSet, number: int) -> None:
    store = found.source().store
    wait_until(lambda: read_state(store).boundary >= number, timeout=60, what="the image moves")


def compare(found: ProtectedSet, source: Source, point: RecoveryPoint, cut: bool = False) -> None:
    """One view against the image that `restore --to-image` makes of the same point."""
    place = Path(tempfile.mkdtemp(prefix="view-", dir=found.root))
    image = found.root / "restored"
    try:
        with shown(source, point, place) as files:
            restore.to_image(source, point, image)
            assert_equal(files, [image], f"{point}")
            if cut:
                wait_for_image(found, int(api.cut(found.name)["number"]))
                assert_equal(files, [image], f"{point}, an interval later")
    finally:
        restore.remove(image)
        shutil.rmtree(place)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_twenty_points_under_load(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    found = make_set(binaries_of(15), fs=fs, size=352 << 20, settings=SETTINGS, allowed=NOISE)
    load = Load(found.address(), found.binaries, postgres_user(), clients=2, ledgers=2, scale=1)
    load.prepare()
    chooser = random.Random(fs)
    load.start()
    load.wait_for(100)
    api.cut(found.name)
    with cutting(found):
        load.wait_for(200)
        for number in range(20):
            source = found.source()
            newest = found.durable()
            kinds = [
                Target("write", chooser.randrange(source.base().write, newest)),
                Target("write", newest),
                Target("boundary", chooser.randrange(len(source.intervals()))),
                Target("write", source.intervals()[-1].to_write + 1),
            ]
            source = found.source()
            point = source.resolve(kinds[0] if number % 2 else kinds[1 + number // 2 % 3])
            compare(found, source, point)
    for kind in ("boundary", "write"):
        number = int(api.cut(found.name)["number"])
        wait_for_image(found, number)
        source = found.source()
        target = Target("boundary", chooser.randrange(number)) if kind == "boundary" else Target("newest")
        compare(found, source, source.resolve(target), cut=True)
    result = load.stop()
    assert not result.failures
    source = found.source()
    assert len(source.intervals()) >= 16
    wait_until(lambda: Span(1, 16) in known(source.store), timeout=120, what="increments merged by the agent")
    last = result.acks[-1].xid
    found.sql("checkpoint")
    for exclusive in (False, True):
        compare(found, source, source.resolve(Target("xid", last, exclusive=exclusive)))


def test_verify_and_salvage_open_in_place(make_set: MakeSet, pg_binaries: Binaries) -> None:
    found = make_set(pg_binaries, size=384 << 20)
    with found.connect() as session:
        session.execute("create table orders as select n as id, md5(n::text) as note from generate_series(1, 20000) n")
        session.execute("alter table orders add primary key (id)")
    api.cut(found.name)
    with found.connect() as session:
        session.execute("delete from orders where id % 2 = 0")
    for target in (Target("boundary", 1), Target("newest")):
        assert api.verify(found.name, target)["ok"]
    told = api.salvage(found.name, Target("newest"), Wanted(("orders",)), before="delete from orders")
    assert told["tables"][0]["rows"] == 20000
    assert found.sql("select count(*), max(note) = md5('9999') from orders_salvaged where id <= 10000") == [
        (10000, False)
    ]
    assert not scratch_place(found.source()).exists()
    api.cut(found.name)
    assert api.verify(found.name, Target("newest"))["ok"]


MARKER = b"a row that only one block holds"


def damaged_at(found: ProtectedSet, kind: str) -> tuple[Path, int, Target]:
    """A byte whose loss `verify` of that target must tell, whoever meets it: mount, Postgres, or a check."""
    store = found.source().store
    image = store.image / "data.img"
    if kind == "superblock":
        return image, 1100 if found.fs == "ext4" else 100, Target("newest")
    if kind == "table":
        places = [match.start() for match in re.finditer(MARKER, image.read_bytes())]
        # The first row of a page lies at its very end; WAL has it elsewhere.
        return image, next(at for at in places if -(at + len(MARKER)) % BLOCK < 8), Target("newest")
    with FrameReader.open(store.interval(1) / "backward", b"BWRD", store.set_id, 1) as frames:
        return frames.path, frames.entries[0].offset + 50, Target("boundary", 0)


@pytest.mark.parametrize("kind", ["superblock", "table", "backward"])
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_verification_that_meets_damage_names_the_file(
    make_set: MakeSet, binaries_of: BindirOf, fs: str, kind: str
) -> None:
    found = make_set(binaries_of(15), fs=fs, size=352 << 20)
    found.sql(f"create table t as select n, '{MARKER.decode()}'::text from generate_series(1, 1) n")
    number = int(api.cut(found.name)["number"])
    wait_for_image(found, number)
    path, at, target = damaged_at(found, kind)
    with flipped(path, at, 0):
        with pytest.raises(DamageError, match=rf"{path} has a damaged .* at offset \d+") as raised:
            api.verify(found.name, target)
        assert raised.value.exit_code == 5
        assert raised.value.hint
        assert not scratch_place(found.source()).exists()
    assert api.verify(found.name, target)["ok"]


def test_damage_that_a_running_clone_meets_is_listed_with_its_file(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Postgres tells its client of an input/output error; of what, nobody would know."""
    found = make_set(binaries_of(15), size=352 << 20)
    found.sql(f"create table t as select n, '{MARKER.decode()}'::text from generate_series(1, 1) n")
    number = int(api.cut(found.name)["number"])
    wait_for_image(found, number)
    path, at, _ = damaged_at(found, "table")
    made = api.clone(found.name, Target("boundary", number))
    try:
        assert api.clones()["clones"][0]["problem"] is None
        with flipped(path, at, 0):
            with psycopg.connect(made["dsn"]) as connection, pytest.raises(psycopg.Error):
                connection.execute("select * from t")
            assert f"{path} has a damaged" in api.clones()["clones"][0]["problem"]
    finally:
        api.destroy(made["name"])
