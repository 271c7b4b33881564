"""The interval that holds a gap is lost: the gap is shown all the same, and no time in it is a target."""

from __future__ import annotations

import pytest

from pgcdp import api, opening
from pgcdp.errors import TargetError
from pgcdp.records import Target
from pgcdp.store.damage import Damage
from pgcdp.store.gaps import MARKER
from pgcdp.store.layout import Store
from pgcdp.store.scrub import check_store
from pgcdp.units import parse_time
from tests.cluster.test_changed_volumes import mounted_plain, small
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet


def scrubbed(store: Store) -> list[Damage]:
    return check_store(store, full=False).damages


def test_a_lost_interval_does_not_hide_its_gap(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = small(make_set, binaries_of, "ext4")
    api.down(found.name)
    (volume,) = found.config.volumes
    with mounted_plain(found, volume) as place:
        (place / "foreign").write_bytes(b"x" * 100_000)
    told = api.up(found.name, heal=lambda found: None)["gap"]
    api.cut(found.name)
    found.sql("insert into kept values (2)")
    newest = api.cut(found.name)["number"]
    api.down(found.name)
    source = opening.open_source(None, found.store)
    gaps = source.gaps()
    assert [(each.begin, each.since_ns) for each in gaps] == [(told["from_write"], parse_time(told["from_time"]))]
    (number,) = [each.number for each in source.intervals() if each.gaps]
    assert number < newest
    assert gaps[0].to_ns is not None
    middle = Target("time", (gaps[0].since_ns + gaps[0].to_ns) // 2)
    with pytest.raises(TargetError, match="lies in a gap") as whole:
        source.resolve(middle)

    manifest = source.store.interval(number) / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(before[:-40])
    damaged = opening.open_source(None, found.store)
    assert damaged.gaps() == gaps
    with pytest.raises(TargetError) as lost:
        damaged.resolve(middle)
    assert lost.value.message == whole.value.message
    assert api.info(None, found.store)["gaps"] == [told]
    assert {each.file.name for each in scrubbed(damaged.store)} == {"manifest.json"}
    manifest.write_bytes(before)

    copy = found.store / MARKER
    copy.write_bytes(copy.read_bytes()[:-40])
    assert opening.open_source(None, found.store).gaps() == gaps, "of the intervals themselves"
    assert {each.file for each in scrubbed(damaged.store)} == {copy}
    copy.unlink()
    assert {each.file for each in scrubbed(damaged.store)} == {copy}
    api.rebuild(found.name)
    assert scrubbed(damaged.store) == []
    assert opening.open_source(None, found.store).gaps() == gaps
