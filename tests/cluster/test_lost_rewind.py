"""The interval that holds a rewind in place is lost: what the rewind left must not count as current again."""

from __future__ import annotations

import pytest

from pgcdp import api, opening
from pgcdp.errors import TargetError
from pgcdp.records import Target
from pgcdp.store.damage import Damage
from pgcdp.store.layout import Store
from pgcdp.store.rewinds import KEPT
from pgcdp.store.scrub import check_store
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet


def scrubbed(store: Store) -> list[Damage]:
    return check_store(store, full=False).damages


def test_a_lost_interval_does_not_hide_its_rewind(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=[r"the agent", r"no look at the catalogs"])
    found.sql("create table t (n int)")
    found.sql("insert into t values (1)")
    point = found.durable()
    api.cut(found.name)
    for _ in range(40):  # the first of these numbers are given anew behind the rewind
        ((left,),) = found.sql("insert into t values (2) returning txid_current()")
    api.cut(found.name)
    api.rewind(found.name, Target("write", point), agree=lambda resolved: None, prove=False)
    found.sql("insert into t values (3)")
    newest = api.cut(found.name)["number"]
    api.down(found.name)
    source = opening.open_source(None, found.store)
    rewinds = source.rewinds()
    (number,) = [each.number for each in source.intervals() if each.rewinds]
    assert number < newest
    with pytest.raises(TargetError, match="is not on the current branch") as whole:
        source.resolve(Target("xid", left))

    manifest = source.store.interval(number) / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(before[:-40])
    damaged = opening.open_source(None, found.store)
    assert damaged.rewinds() == rewinds
    with pytest.raises(TargetError) as told:
        damaged.resolve(Target("xid", left))
    assert told.value.message == whole.value.message
    files = {each.file.name for each in scrubbed(damaged.store)}
    assert files == {"manifest.json"}
    manifest.write_bytes(before)

    copy = found.store / KEPT
    copy.write_bytes(copy.read_bytes()[:-40])
    assert opening.open_source(None, found.store).rewinds() == rewinds, "of the intervals themselves"
    assert {each.file for each in scrubbed(damaged.store)} == {copy}
    copy.unlink()
    assert {each.file for each in scrubbed(damaged.store)} == {copy}
    api.rebuild(found.name)
    assert scrubbed(damaged.store) == []
