"""A restore that reads the image for long must not cost production more than an interval that grows."""

from __future__ import annotations

from pgcdp import api
from pgcdp.store.image_lock import image_held
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until


def requested_checkpoints(found: ProtectedSet) -> int:
    with found.connect() as session:
        row = session.execute("select checkpoints_req from pg_stat_bgwriter").fetchone()
    assert row is not None
    return int(row[0])


def test_postgres_is_not_asked_for_checkpoints_that_nobody_can_cut_at(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, cut=("1s",), settings={"autovacuum": "off"})
    found.sql("create table t (id int)")
    begun = api.cut(found.name)["number"]
    with image_held(found.source().store):
        wait_until(
            lambda: len(found.source().intervals()) > begun, what="the interval whose boundary the image waits at"
        )
        # Boundaries can still come that were asked for before the agent knew that the image waits.
        before = requested_checkpoints(found)
        first = api.status(found.name)["agent"]["taken_write"]
        written = 0
        while api.status(found.name)["agent"]["taken_write"] < first + 400:
            found.sql(f"insert into t select {written} from generate_series(1, 1000)")
            written += 1
        assert requested_checkpoints(found) <= before + 2
    wait_until(lambda: len(found.source().intervals()) > begun + 1, what="the next interval, when the image is free")
