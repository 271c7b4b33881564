"""A store's disk that is full to the last block: retention works in the reserve, which is there again behind it.

Full is really full: a small filesystem on a loop device.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgcdp.errors import PreconditionError
from pgcdp.fsio import free_space
from pgcdp.machine import Place
from pgcdp.records import Boundary, Interval
from pgcdp.recovery.choosing import holding_of, pins_of
from pgcdp.recovery.expiring import expiring, have_reserve
from pgcdp.recovery.sweeping import waiting_bytes
from pgcdp.store.lease import Lease
from pgcdp.store.rebuild import rebuild
from pgcdp.store.reserve import EDGE_BYTES, LEAST_BYTES, MOST_BYTES, SPARE_BYTES, Reserve, is_short, size_for
from pgcdp.store.retention import Policy, plan
from pgcdp.store.scrub import check_store
from tests.dying import dying_after
from tests.failing_disks import SmallDisk
from tests.faults.service import Faults
from tests.fix_years import AN_HOUR, DROP_ALL, HOURLY, NOW, Years, files_of
from tests.scratch import scratch_directory
from tests.unit.test_retention import carried_out, points

HERE = Place("/", "a" * 32, "uuid-1", "one", "boot-1")
ELSEWHERE = Place("/", "b" * 32, "uuid-2", "two", "boot-2")
MakeDisk = Callable[..., SmallDisk]


@pytest.fixture
def small_disk() -> Iterator[MakeDisk]:
    """small_disk(fs="ext4", size=192 MiB): to be filled; room for a reserve, and not much more."""
    root = scratch_directory("reserve")
    made: list[SmallDisk] = []

    def make(fs: str = "ext4", size: int = 192 << 20) -> SmallDisk:
        made.append(SmallDisk(root, "store", size, fs))
        return made[-1]

    yield make
    for disk in made:
        disk.end()
    shutil.rmtree(root)


def history(place: Path, minutes: list[int]) -> Years:
    years = Years(place, 51, [6] * 6, minutes)
    rebuild(years.store)[0].close()
    return years


def remains(years: Years, policy: Policy) -> set[int]:
    """The points that a policy keeps."""
    holding = holding_of(years.store)
    assert holding is not None
    found = plan(holding, policy, pins_of(years.store, holding), NOW)
    assert found
    return points(carried_out(holding, found)) | {len(years.world.ops)}


def reserved(years: Years) -> Reserve:
    return Reserve(years.store, HERE)


# --- having it


def test_the_reserve_is_of_real_blocks_and_nobody_elses(tmp_path: Path, years: Years) -> None:
    reserve = reserved(years)
    assert reserve.make()
    status = reserve.path.stat()
    assert status.st_blocks * 512 >= status.st_size == LEAST_BYTES
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert check_store(years.store).ok
    rebuild(years.store)[0].close()
    years.assert_only(set(range(1, len(years.world.ops) + 1)))


def test_a_reserve_that_was_copied_as_a_hole_gets_its_blocks(years: Years) -> None:
    reserve = reserved(years)
    with reserve.path.open("wb") as file:
        file.truncate(LEAST_BYTES)
    assert reserve.bytes() == 0, "there is no room in it"
    assert reserve.make()
    assert reserve.bytes() == LEAST_BYTES


def test_a_reserve_is_no_reason_for_a_disk_to_be_full(small_disk: MakeDisk) -> None:
    disk = small_disk()
    years = history(disk.place, AN_HOUR)
    ballast = disk.place / "others"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_space(disk.place) - SPARE_BYTES - LEAST_BYTES // 2)
    assert not reserved(years).make()
    assert is_short(years.store.path) == (free_space(disk.place) <= SPARE_BYTES)
    ballast.unlink()
    assert reserved(years).make()
    assert not is_short(years.store.path)


def test_a_reserve_is_as_large_as_what_thinning_takes() -> None:
    def interval(number: int, writes: int, changed: int) -> Interval:
        stored = {"writes": writes, "backward": 1, "forward": 1, "index": 1, "transactions": 0}
        end = Boundary(number, number * 10, number, 1, 1, 1, 1, "period")
        return Interval(number, number * 10 - 9, number * 10, 0, 1, end, 10, 1 << 30, changed, stored)

    half = interval(1, 100 << 20, (1 << 30) // 2 // 4096)
    assert (50 << 20) < size_for([half]) <= (64 << 20)
    assert size_for([]) == size_for([half._replace(restorable_by_write=False)]) == LEAST_BYTES
    assert size_for([interval(1, 1 << 30, 1 << 18), half]) == MOST_BYTES


def test_the_store_of_another_machine_is_left_alone(years: Years) -> None:
    reserve = reserved(years)
    assert reserve.make()
    Lease.take(years.store, ELSEWHERE).release()
    before = reserve.path.stat()
    for change in (reserve.make, reserve.release, reserve.put_back):
        with pytest.raises(PreconditionError, match="belongs to two"):
            change()
    have_reserve(reserve)
    assert reserve.path.stat() == before
    reserve.path.unlink()
    have_reserve(reserve)
    assert not reserve.path.exists()


# --- letting go in it


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
@pytest.mark.parametrize(
    ("policy", "minutes"), [(Policy(0.0), AN_HOUR), (HOURLY, AN_HOUR), (DROP_ALL, [1500] * 6)],
    ids=["thin", "join", "base"],
)  # fmt: skip
def test_retention_on_a_disk_without_a_block(small_disk: MakeDisk, fs: str, policy: Policy, minutes: list[int]) -> None:
    disk = small_disk(fs, 192 << 20 if fs == "ext4" else 320 << 20)
    years = history(disk.place, minutes)
    kept, reserve = remains(years, policy), reserved(years)
    have_reserve(reserve)
    assert reserve.bytes() == LEAST_BYTES
    disk.fill()
    with expiring(years.store):
        done = years.run(policy, reserve=reserve)
    assert not done.failed
    assert done.bytes
    assert reserve.bytes() >= LEAST_BYTES - 2 * EDGE_BYTES, "for the next time"
    disk.empty()
    years.assert_only(kept)
    years.assert_sound()


@pytest.mark.parametrize("skip", [0, 3])
def test_not_even_a_name_finds_room_for_what_is_let_go_of(years: Years, failing: Faults, skip: int) -> None:
    """On xfs a directory needs a block after some names."""
    reserve = reserved(years)
    assert reserve.make()
    kept = remains(years, Policy(0.0))
    failing.set("recovery.sweeping.sweep.rename", "enospc", skip=skip)
    with expiring(years.store):
        done = years.run(Policy(0.0), reserve=reserve)
    assert failing.fired("recovery.sweeping.sweep.rename")
    assert not done.failed
    assert done.bytes
    assert reserve.bytes() == LEAST_BYTES
    assert not waiting_bytes(years.store)
    years.assert_only(kept)


def test_without_reserve_and_block_it_is_said_what_to_do(small_disk: MakeDisk) -> None:
    disk = small_disk()
    years = history(disk.place, AN_HOUR)
    before = files_of(years.store)
    disk.fill()
    with pytest.raises(PreconditionError, match=r"cannot be made: No space left on device, .* no reserve") as told:
        years.run(Policy(0.0), reserve=reserved(years))
    assert "pgcdp expire" in str(told.value.hint)
    assert files_of(years.store) == before
    assert is_short(years.store.path), "an agent that starts makes room before it writes"
    disk.empty()
    assert years.run(Policy(0.0), reserve=reserved(years)).thin == [1, 2, 3, 4, 5]


def test_a_policy_that_keeps_everything_leaves_the_reserve(small_disk: MakeDisk) -> None:
    disk = small_disk()
    years = history(disk.place, AN_HOUR)
    years.run(Policy())
    have_reserve(reserved(years))
    before = reserved(years).path.stat()
    disk.fill()
    done = years.run(Policy(10**9), reserve=reserved(years))
    assert (done.bytes, done.failed) == (0, [])
    assert reserved(years).path.stat() == before


@pytest.mark.parametrize("policy", [Policy(0.0), HOURLY], ids=["thin", "join"])
def test_killed_in_the_reserve_it_comes_back(small_disk: MakeDisk, policy: Policy) -> None:
    """At each change of the disk: giving the reserve free, letting go, making it anew."""
    disk = small_disk()
    years = history(disk.place, AN_HOUR)
    kept, store = remains(years, policy), years.store
    before = disk.place.parent / "before"
    shutil.copytree(store.path, before, symlinks=True)
    kills = missing = 0
    for changes in range(10_000):
        disk.empty()
        shutil.rmtree(store.path)
        shutil.copytree(before, store.path, symlinks=True)
        have_reserve(reserved(years))
        disk.fill()
        with dying_after(changes) as fate:
            years.run(policy, reserve=reserved(years))
        if not fate.dead:
            break
        kills += 1
        missing += not reserved(years).bytes()
        assert check_store(store).ok, f"killed after {changes} changes"
        rebuild(store)[0].close()
        done = years.run(policy, reserve=reserved(years))
        assert not done.failed, f"killed after {changes} changes"
        assert remains_now(years) == kept, f"killed after {changes} changes"
        disk.empty()
        have_reserve(reserved(years))
        assert reserved(years).bytes() == LEAST_BYTES
        years.assert_only(kept)
    assert missing > 5
    assert kills > missing


def remains_now(years: Years) -> set[int]:
    holding = holding_of(years.store)
    assert holding is not None
    return points(holding) | {len(years.world.ops)}


# --- what needs too much


def test_what_finds_no_room_to_be_joined_is_thinned(tmp_path: Path, failing: Faults) -> None:
    years = history(tmp_path / "store", AN_HOUR)
    failing.set("recovery.joining.join.mkdir", "enospc", times=0)
    done = years.expire(HOURLY)
    assert (done.joins, done.thin) == ([], [1, 2, 3, 4, 5])
    failing.clear("recovery.joining.join.mkdir")
    assert not years.expire(HOURLY).failed
    years.assert_only(remains_now(years))


def test_an_interval_too_large_for_the_room_does_not_keep_the_others_from_giving_some(
    tmp_path: Path, failing: Faults
) -> None:
    years = history(tmp_path / "store", AN_HOUR)
    failing.set("store.thinning._thin.fsync", "enospc", times=1)
    done = years.expire(Policy(0.0))
    assert sorted(done.thin) == [1, 2, 3, 4, 5], "the first one again when there is room"
    assert not done.failed
