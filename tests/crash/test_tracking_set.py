"""on_full = track: the journal's disk gets full under pgbench, capture dies in the gap, and the set heals."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.config import save_config
from pgcdp.errors import PreconditionError, TargetError
from pgcdp.records import Target
from tests.crash.test_held_capture import ALLOWED, SUMS, Bench
from tests.crash.test_kill_set import ALLOWED as DYING
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until

MIB = 1 << 20
MANY = 2000
"""So many blocks are changed before a gap may end."""
SAID = [
    *ALLOWED,
    *DYING,
    r"the journal is full",
    r"writes go on",
    r"the journal cannot grow",
    r"blocks were changed while the journal",
    r"changes are tracked",
    r"No space left on device",
    r"cannot make a segment",
    r"heal: the journal",
    r"no checkpoint: ",
    # What comes in is in the order of blocks: WAL may come too long before the WAL in front of it to be followed.
    r"the record of its boundary's checkpoint, at \S+, was not found in its WAL",
    r"WAL \S+ to \S+ was not seen whole",
]


def fill_disk(place: Path, leave: int) -> Path:
    """A file that takes all of a disk's room but `leave` bytes."""
    ballast = place / "ballast"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)
    return ballast


def tracking_set(make_set: MakeSet, binaries_of: BindirOf, journal_disk: Path, **options: Any) -> ProtectedSet:
    found = make_set(
        binaries_of(15),
        size=768 * MIB,
        allowed=SAID,
        journal=journal_disk / "j",
        journal_limit=512 * MIB,
        settings={"shared_buffers": "32MB"},
        **options,
    )
    return made_to_track(found)


def made_to_track(found: ProtectedSet) -> ProtectedSet:
    """With pgbench's tables, and `on_full = track` from now on."""
    found.pgbench("-i", "-q", "-s", "5")
    found.sql("checkpoint")
    api.cut(found.name)
    api.down(found.name)
    save_config(replace(found.config, on_full="track", segment_size=8 * MIB))
    found.up()
    found.wait_following()
    return found


def until_tracking(found: ProtectedSet) -> None:
    wait_until(lambda: found.engine.status().state == "tracking", timeout=120, what="tracking")


def assert_shown(found: ProtectedSet) -> int:
    """What the commands say in the gap; the last write before it."""
    tracked = api.status(found.name)["tracked"]
    assert api.status(found.name)["state"] == "tracking"
    assert tracked["blocks"] > 0
    said = api.info(found.name)["gaps"][-1]
    assert (said["reason"], said["from_write"], said["to_write"]) == ("untracked", tracked["behind_write"] + 1, None)
    for told in (api.status(found.name), api.info(found.name)):
        assert told["recovery_window"]["to_write"] == tracked["behind_write"]
    (capture,) = [each for each in api.check(found.name)["checks"] if each["name"] == "capture"]
    assert not capture["ok"]
    assert "missing in the journal" in capture["detail"]
    with pytest.raises(PreconditionError, match="tracked"):
        api.mark(found.name, "here")
    with pytest.raises(TargetError, match="lies in a gap"):
        found.source().resolve(Target("time", time.time_ns()))
    newest = api.resolve(found.name, Target("newest"))["recovery_point"]
    assert newest["write"] == tracked["behind_write"]
    assert "in front of a gap that has not ended" in newest["note"]
    return int(tracked["behind_write"])


def into_a_gap(found: ProtectedSet, journal_disk: Path) -> tuple[Path, Bench, int]:
    """The journal's disk gets full under pgbench: what fills it, the clients, and the last write before the gap."""
    ballast = fill_disk(journal_disk, 24 * MIB)
    found.kill_agent()
    bench = Bench.start(found, 600)
    until_tracking(found)
    wait_until(lambda: api.status(found.name)["tracked"]["blocks"] > MANY, timeout=120, what="many changed blocks")
    return ballast, bench, assert_shown(found)


def until_healed(found: ProtectedSet) -> None:
    wait_until(lambda: found.engine.status().state == "capturing", timeout=180, what="the end of the gap")


def assert_healed(found: ProtectedSet, before: int) -> None:
    """A boundary lies behind the gap's end; what is outside of the gap opens, what is inside is refused."""

    def healed() -> bool:
        source = found.source()
        gaps = source.gaps()
        return bool(gaps) and gaps[-1].end is not None and source.intervals()[-1].to_write > gaps[-1].end

    until_healed(found)
    wait_until(healed, timeout=180, interval=0.5, what="a boundary behind the gap")
    (gap,) = found.source().gaps()
    assert gap.begin == before + 1
    assert gap.reason == "untracked"
    assert gap.blocks > 0
    assert gap.end is not None
    for write in (gap.begin, (gap.begin + gap.end) // 2, gap.end - 1):
        with pytest.raises(TargetError, match="lies in a gap"):
            found.source().resolve(Target("write", write))
    with pytest.raises(TargetError, match="lies in a gap"):
        found.source().resolve(Target("time", (gap.since_ns + int(gap.to_ns or 0)) // 2))
    newest = api.resolve(found.name, Target("newest"))["recovery_point"]
    assert newest["write"] > gap.end
    assert newest["note"] is None
    for write in (before, gap.end, found.source().intervals()[-1].to_write):
        result = found.verify(write)
        assert result["ok"], result


def assert_equal_at_the_end(found: ProtectedSet) -> None:
    account, branches, tellers, history = found.sql(SUMS)[0]
    assert account == branches == tellers == history
    found.amcheck()
    api.down(found.name)
    found.assert_volume_is_newest()


def test_capture_dies_in_the_gap_and_its_successor_goes_on(
    journal_disk: Path, make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """No client sees anything: neither of the full disk, nor of the kill, nor of the way back."""
    found = tracking_set(make_set, binaries_of, journal_disk)
    ballast, bench, before = into_a_gap(found, journal_disk)
    found.kill_capture()
    ballast.unlink()
    found.up()
    until_healed(found)
    bench.end()
    assert_healed(found, before)
    assert_equal_at_the_end(found)


def test_all_is_killed_in_the_gap(journal_disk: Path, make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Without a holder Postgres recovers from what was tracked; then the set heals."""
    found = tracking_set(make_set, binaries_of, journal_disk)
    ballast = fill_disk(journal_disk, 24 * MIB)
    found.kill_agent()
    user = subprocess.Popen(
        found.program("pgbench", "-n", "-c", "4", "-T", "60", "postgres"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", user="postgres",
    )  # fmt: skip
    until_tracking(found)
    before = assert_shown(found)
    committed = found.sql("select count(*) from pgbench_history")[0][0]
    found.kill_engine()
    user.wait(timeout=90)
    ballast.unlink()
    found.up()
    assert found.sql("select count(*) from pgbench_history")[0][0] >= committed
    assert_healed(found, before)
    assert_equal_at_the_end(found)
