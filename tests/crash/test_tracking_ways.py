"""on_full = track: several volumes of xfs, a volume changed meanwhile, and the boundary that heals the set."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgcdp import api, service
from pgcdp.errors import PreconditionError
from pgcdp.healing import Differences
from pgcdp.postgres import cluster
from tests.cluster.test_changed_volumes import mounted_plain
from tests.crash.test_tracking_set import (
    MIB,
    SAID,
    assert_equal_at_the_end,
    assert_healed,
    into_a_gap,
    made_to_track,
    tracking_set,
    until_healed,
)
from tests.data_directory import configure, new_data_directory
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until


def two_volumes(make_set: MakeSet, binaries_of: BindirOf, journal_disk: Path) -> ProtectedSet:
    """Data directory and pg_wal on a volume each, both xfs."""
    found = make_set(binaries_of(15), protect=False, allowed=SAID, fs="xfs")
    new_data_directory(found.binaries, found.pgdata)
    configure(found.pgdata, found.place({"shared_buffers": "32MB", "max_wal_size": "128MB"}))
    api.protect(
        found.name, found.pgdata, found.store, size=768 * MIB, wal_size=400 * MIB, fs="xfs", yes=True,
        bindir=found.binaries.directory, journal=journal_disk / "j", journal_limit=512 * MIB,
    )  # fmt: skip
    return made_to_track(found)


def test_two_volumes_of_xfs_heal_as_one(journal_disk: Path, make_set: MakeSet, binaries_of: BindirOf) -> None:
    """One gap over both: at each point outside of it they are of one moment."""
    found = two_volumes(make_set, binaries_of, journal_disk)
    assert [(volume.name, volume.fs) for volume in found.config.volumes] == [("data", "xfs"), ("wal", "xfs")]
    ballast, bench, before = into_a_gap(found, journal_disk)
    found.kill_capture()
    ballast.unlink()
    found.up()
    until_healed(found)
    bench.end()
    assert_healed(found, before)
    assert_equal_at_the_end(found)


def test_a_volume_that_was_changed_while_changes_were_tracked(
    journal_disk: Path, make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """`down` in the gap, somebody writes to the volume, `up --heal`: what was tracked comes in first, then the rest."""
    found = tracking_set(make_set, binaries_of, journal_disk)
    ballast, bench, before = into_a_gap(found, journal_disk)
    bench.end()
    history = found.sql("select count(*) from pgbench_history")
    api.down(found.name)
    (volume,) = found.config.volumes
    away = volume.backing.rename(found.root / "away")
    with pytest.raises(PreconditionError, match=f"behind write {before} was tracked, and is on them alone"):
        api.up(found.name, remake=["data"])
    away.rename(volume.backing)
    with mounted_plain(found, volume) as place:
        (place / "foreign").write_bytes(b"x" * MIB)
    ballast.unlink()
    seen: list[Differences] = []
    told = api.up(found.name, heal=seen.append)
    assert seen[0].volumes["data"] > MIB, "what was tracked is missing as well"
    tracked, changed = found.source().gaps()
    assert (tracked.begin, tracked.reason, changed.reason) == (before + 1, "untracked", "changed")
    assert told["gap"]["from_write"] == changed.begin
    assert tracked.end is not None
    assert changed.end is not None
    assert MIB // 4096 <= changed.blocks < tracked.blocks
    assert found.sql("select count(*) from pgbench_history") == history
    assert (found.pgdata / "foreign").stat().st_size == MIB
    end = changed.end
    wait_until(lambda: found.source().intervals()[-1].to_write > end, timeout=120, interval=0.5, what="a boundary")
    for write in (before, end):
        result = found.verify(write)
        assert result["ok"], result
    assert_equal_at_the_end(found)


def test_the_boundary_behind_a_gap_is_asked_for_until_it_is_there(
    journal_disk: Path, make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """Postgres is down when the gap ends, and the agent is another one when it is back."""
    found = tracking_set(make_set, binaries_of, journal_disk, cut=("2h",))
    ballast, bench, before = into_a_gap(found, journal_disk)
    bench.end()
    cluster.stop(found.pgdata)
    ballast.unlink()
    log = found.config.paths.agent_log
    said = log.read_text().count("no checkpoint: ")
    service.start(found.config)
    until_healed(found)
    wait_until(lambda: log.read_text().count("no checkpoint: ") > said, timeout=60, what="a question in vain")
    found.kill_agent()
    found.up()
    assert_healed(found, before)
    assert found.source().intervals()[-1].boundary.reason == "gap"
    assert_equal_at_the_end(found)
