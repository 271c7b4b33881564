"""A long history of small intervals, expired to a policy by runs that are killed again and again.

Every point that should remain is then what the dumb model says, byte for byte; sizes are told. The full numbers, 10,000
intervals, are a soak; a few hundred run always.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pgcdp.fsio import free_space
from pgcdp.records import Target
from pgcdp.recovery import merged
from pgcdp.recovery.choosing import holding_of, pins_of
from pgcdp.store.history import add_history
from pgcdp.store.kept import keep_event
from pgcdp.store.rebuild import rebuild
from pgcdp.store.retention import Policy, plan
from pgcdp.store.scrub import check_store
from tests.dying import dying_after
from tests.fix_years import HOURLY, NOW, Years, files_of
from tests.results import keep_result
from tests.unit.test_blockmap import served
from tests.unit.test_increments import BLOCKS, apply_op
from tests.unit.test_retention import carried_out, points

HOUR, DAY = 3600.0, 86400.0


def expired_history(place: Path, count: int, policy: Policy, kills_within: int) -> dict[str, object]:
    """`count` intervals five minutes apart; what was measured."""
    started = time.monotonic()
    years = Years(place, 31, [4] * count, [5] * count, 3)
    store = years.store
    merged.merge_due(store)
    rebuild(store)[0].close()
    made = time.monotonic() - started
    add_history(store, "event", 1, keep_event("kept", count, True))
    point = {"write": 0, "boundary": count // 3, "lsn": None}
    add_history(store, "verification", 1, {"ok": True, "recovery_point": point, "interval": count // 3})
    before = files_of(store)
    holding = holding_of(store)
    assert holding is not None
    found = plan(holding, policy, pins_of(store, holding), NOW)
    remains = points(carried_out(holding, found)) | set(range(years.done, len(years.world.ops) + 1))
    kills, begun = 0, time.monotonic()
    while True:
        with dying_after(years.chooser.randrange(1, kills_within)) as fate:
            years.run(policy)
        if not fate.dead:
            break
        kills += 1
    took = time.monotonic() - begun
    assert_exactly(years, remains)
    assert check_store(store).ok
    after = files_of(store)
    return {
        "intervals": count,
        "left": len(store.spans()),
        "points": {"before": len(years.world.ops) + 1, "after": len(remains)},
        "bytes": {"before": by_kind(before), "after": by_kind(after)},
        "kills": kills,
        "seconds": {"making": round(made, 1), "expiring_with_kills": round(took, 1)},
    }


def assert_exactly(years: Years, remains: set[int]) -> None:
    """Each write that should remain is right, and no other can be restored."""
    model = [bytearray(BLOCKS * 4096) for _ in range(2)]
    source = years.source()
    holding = holding_of(years.store)
    assert holding is not None
    assert points(holding) == {write for write in remains if write <= years.done}
    for write in range(1, len(years.world.ops) + 1):
        apply_op(model, years.world.ops[write - 1])
        if write in remains:
            view = years.mapped(source.resolve(Target("write", write)))
            assert served(view) == [bytes(volume) for volume in model], f"write {write}"


def by_kind(files: dict[str, int]) -> dict[str, int]:
    """Bytes by the name of the file; all of them as "all"."""
    found = {"all": sum(files.values())}
    for name, size in files.items():
        kind = name.partition("/")[0]
        kind = os.path.basename(name) if kind in ("intervals", "joined", "base") else kind
        found[kind] = found.get(kind, 0) + size
    return found


def test_a_few_hundred_intervals_expired_by_runs_that_are_killed(tmp_path: Path) -> None:
    told = expired_history(tmp_path, 240, Policy(HOUR, 4 * HOUR, 10 * HOUR, 14 * HOUR), 400)
    assert told["kills"]


def test_a_full_disk_costs_no_point_and_room_is_made_on_it(tmp_path: Path) -> None:
    """Somebody else fills the store's disk: what finds no room is left as it was, and gone on with later."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    try:
        years = Years(disk, 41, [4] * 24, [5] * 11 + [60] * 2 + [5] * 11)
        store, filler = years.store, disk / "filler"
        holding = holding_of(store)
        assert holding is not None
        remains = points(carried_out(holding, plan(holding, HOURLY, pins_of(store, holding), NOW)))
        for room in (0, 4096, 16384, 65536):
            with filler.open("wb") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, free_space(disk) - room))
            done = years.run(HOURLY)
            assert all("is full" in each or "cannot be read" in each for each in done.failed)
            assert done.failed or room
            filler.unlink()
            assert check_store(store).ok
            found = holding_of(store)
            assert found is not None
            assert remains <= points(found) <= points(holding)
        years.run(HOURLY)
        assert_exactly(years, remains)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.soak
def test_ten_thousand_intervals_expired_by_runs_that_are_killed(tmp_path: Path) -> None:
    told = expired_history(tmp_path, 10_000, Policy(12 * HOUR, 2 * DAY, 10 * DAY, 25 * DAY), 4000)
    assert told["kills"]
    keep_result("retention-10000-intervals", told)
