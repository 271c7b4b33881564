"""Somebody wrote to a volume while it was detached: `up` refuses, and `up --heal` takes it in as a gap (truth 9)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgcdp import api, healing, service
from pgcdp.capture import attach, fingerprint, volumes
from pgcdp.capture import protect as protection
from pgcdp.capture.checks import ProtectRequest
from pgcdp.config import VolumeConfig
from pgcdp.errors import PgcdpError, PreconditionError, TargetError
from pgcdp.healing import Differences
from pgcdp.postgres import cluster
from pgcdp.proc import user_named
from pgcdp.records import Target
from pgcdp.units import parse_time
from tests.crash.test_kill_set import ALLOWED
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet, first_difference
from tests.moments import scratch_below

BOTH = pytest.mark.parametrize("fs", ["ext4", "xfs"])


@contextmanager
def mounted_plain(found: ProtectedSet, volume: VolumeConfig, *options: str) -> Iterator[Path]:
    """The volume as anybody can mount it, without pgcdp."""
    place = found.root / "plain"
    place.mkdir(exist_ok=True)
    device = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", str(volume.backing)],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    try:
        words = ["-o", ",".join(options)] if options else []
        subprocess.run(["mount", "-t", volume.fs, *words, device, str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)
    finally:
        volumes.detach_loop(Path(device))  # waits: a sandbox that is just starting has all mounts for a moment


def small(make_set: MakeSet, binaries_of: BindirOf, fs: str, **options: object) -> ProtectedSet:
    found = make_set(binaries_of(15), fs=fs, size=384 << 20, **options)
    found.sql("create table kept (n int)")
    found.sql("insert into kept values (1)")
    api.cut(found.name)
    return found


@BOTH
def test_a_volume_that_was_written_to_is_refused_healed_and_its_gap_shown(
    make_set: MakeSet, binaries_of: BindirOf, fs: str
) -> None:
    found = small(make_set, binaries_of, fs)
    found.sql("insert into kept values (2)")
    before = found.durable()
    boundaries = found.status()["intervals"]
    api.down(found.name)
    (volume,) = found.config.volumes
    last = found.source().newest()
    with mounted_plain(found, volume) as place:
        (place / "foreign").write_bytes(b"x" * 100_000)
    with pytest.raises(PreconditionError, match=r"volume data of main .* was changed after it was detached") as told:
        found.up()
    assert "--heal" in str(told.value.hint)
    assert told.value.exit_code == 6
    if fs == "ext4":
        assert f"mounted at {found.root}/plain on " in told.value.message
    assert not found.capturing()
    assert volumes.mount_at(found.pgdata) is None
    assert cluster.find_postmaster(found.pgdata) is None

    seen: list[Differences] = []

    def stop(differs: Differences) -> None:
        seen.append(differs)
        raise PgcdpError("not confirmed")

    with pytest.raises(PgcdpError, match="not confirmed"):
        api.up(found.name, heal=stop)
    assert seen[0].volumes["data"] >= 100_000
    assert seen[0].changed
    assert not found.capturing()
    with pytest.raises(PreconditionError, match="was changed"):
        found.up()  # a look changes nothing

    as_found = found.root / "as-found.img"
    shutil.copyfile(volume.backing, as_found)
    told_up = api.up(found.name, heal=seen.append)
    gap = told_up["gap"]
    (healed,) = found.restored(Target("write", gap["to_write"] + 1))
    assert first_difference(as_found, healed, volume.bytes) is None, "behind the gap is what was on the volume"
    for each in (as_found, healed):
        each.unlink()
    assert seen[1] == seen[0]
    assert (gap["from_write"], gap["reason"]) == (last + 1, "changed")
    assert gap["blocks"] >= seen[0].volumes["data"] // 4096
    assert found.sql("select n from kept order by n") == [(1,), (2,)]
    assert (found.pgdata / "foreign").read_bytes() == b"x" * 100_000
    found.wait_following()
    assert api.info(found.name)["gaps"] == [gap], "of the open interval"
    found.sql("insert into kept values (3)")
    api.cut(found.name)
    info = api.info(found.name)
    assert info["gaps"] == [gap], "of a published interval"
    assert len(info["intervals"]) > boundaries
    assert api.log(found.name)["gaps"] == [gap]
    assert api.find(found.name, "insert into kept")["gaps"] == [gap]
    assert {each["status"] for each in api.log(found.name)["transactions"]} == {"committed"}

    for inside in (gap["from_write"], (gap["from_write"] + gap["to_write"]) // 2, gap["to_write"]):
        with pytest.raises(TargetError, match="lies in a gap") as refused:
            found.source().resolve(Target("write", inside))
        assert f"--target-write {last} is the nearest before it" in str(refused.value.hint)
        assert f"--target-write {gap['to_write'] + 1} the nearest behind it" in str(refused.value.hint)
    middle = (parse_time(gap["from_time"]) + parse_time(gap["to_time"])) // 2
    with pytest.raises(TargetError, match="lies in a gap"):
        found.source().resolve(Target("time", middle))
    assert api.show(found.name, gap["from_write"])["holds"] == {"what": "gap", "gap": "begin", "reason": "changed"}

    for write, rows, foreign in ((before, 2, False), (last, 2, False), (gap["to_write"] + 1, 2, True)):
        with found.running_at(Target("write", write)) as box, box.connect() as connection:
            assert connection.execute("select count(*) from kept").fetchone() == (rows,), write
            assert (box.pgdata / "foreign").exists() == foreign, write
    found.amcheck()
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)


@BOTH
def test_a_volume_that_nobody_changed_is_not_refused(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    """Also when it was mounted to be read, with its log left alone."""
    found = small(make_set, binaries_of, fs)
    for _ in range(2):
        api.down(found.name)
        assert fingerprint.known(found.config) is not None
        with mounted_plain(found, found.config.volumes[0], "ro", "noload" if fs == "ext4" else "norecovery") as place:
            assert (place / "PG_VERSION").read_text().strip() == "15"
        found.up()
        assert found.sql("select count(*) from kept") == [(1,)]
    api.down(found.name)
    seen: list[Differences] = []
    assert api.up(found.name, heal=seen.append)["gap"] is None
    assert seen == []
    assert api.info(found.name)["gaps"] == []


@BOTH
def test_a_mount_that_wrote_nothing_but_the_filesystems_own_is_refused(
    make_set: MakeSet, binaries_of: BindirOf, fs: str
) -> None:
    """Its log went on: a restore of a later point would find the log of two different histories."""
    found = small(make_set, binaries_of, fs)
    api.down(found.name)
    with mounted_plain(found, found.config.volumes[0], "noatime"):
        pass
    with pytest.raises(PreconditionError, match="was changed after it was detached"):
        found.up()
    assert api.up(found.name, heal=lambda found: None)["gap"]["blocks"] > 0
    api.down(found.name)
    found.assert_volume_is_newest()


def test_after_an_unclean_stop_the_fingerprint_does_not_count_and_the_journal_replayed(
    make_set: MakeSet, binaries_of: BindirOf
) -> None:
    found = small(make_set, binaries_of, "ext4", allowed=[*ALLOWED, r"the agent"])
    api.down(found.name)
    found.up()
    found.sql("insert into kept select generate_series(2, 2000)")
    found.kill_both()
    assert fingerprint.known(found.config) is None
    found.up()
    assert found.sql("select count(*) from kept") == [(2000,)]
    api.down(found.name)
    assert fingerprint.known(found.config) is not None
    found.up()


@BOTH
def test_a_postgres_that_ran_on_the_plain_volume_is_taken_in(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    """Its transactions are in no point by themselves, but behind the gap all of them are; amcheck is content."""
    found = small(make_set, binaries_of, fs)
    before = found.durable()
    api.down(found.name)
    (volume,) = found.config.volumes
    user = user_named(found.config.cluster.owner)
    with mounted_plain(found, volume) as place:
        words = [str(found.binaries.path("postgres")), "--single", "-D", str(place), "postgres"]
        statement = b"insert into kept select generate_series(2, 5000)\n"
        subprocess.run(words, input=statement, check=True, capture_output=True, cwd="/", user=user.uid, group=user.gid)
    with pytest.raises(PreconditionError, match="pg_control has checkpoint") as told:
        found.up()
    assert "its log" in told.value.message or "mount count" in told.value.message
    gap = api.up(found.name, heal=lambda found: None)["gap"]
    assert found.sql("select count(*) from kept") == [(5000,)]
    found.sql("insert into kept values (0)")
    last = found.durable()
    api.cut(found.name)
    found.amcheck()
    for write, rows in ((before, 1), (gap["from_write"] - 1, 1), (gap["to_write"] + 1, 5000), (last, 5001)):
        with found.running_at(Target("write", write)) as box, box.connect() as connection:
            assert connection.execute("select count(*) from kept").fetchone() == (rows,)
    api.down(found.name)
    found.assert_volume_is_newest()


def test_an_older_copy_of_the_volume_in_its_place_is_taken_in(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """WAL goes back: what is cut behind it is right, and the points before it too."""
    found = small(make_set, binaries_of, "ext4", allowed=[r"the WAL went back"])
    api.down(found.name)
    (volume,) = found.config.volumes
    copy = found.root / "copy.img"
    shutil.copyfile(volume.backing, copy)
    found.up()
    found.sql("insert into kept select generate_series(2, 9)")
    newest = found.durable()
    api.cut(found.name)
    api.down(found.name)
    shutil.copyfile(copy, volume.backing)
    with pytest.raises(PreconditionError, match="was changed"):
        found.up()
    gap = api.up(found.name, heal=lambda found: None)["gap"]
    assert found.sql("select count(*) from kept") == [(1,)]
    api.cut(found.name)
    for write, rows in ((newest, 9), (gap["to_write"] + 1, 1)):
        with found.running_at(Target("write", write)) as box, box.connect() as connection:
            assert connection.execute("select count(*) from kept").fetchone() == (rows,)
    api.down(found.name)
    found.assert_volume_is_newest()


def test_a_fingerprint_that_is_damaged_is_said(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = small(make_set, binaries_of, "ext4")
    api.down(found.name)
    path = found.config.journal / fingerprint.FILE
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"write"', b'"wrote"'))
    with pytest.raises(PreconditionError, match="is damaged: whether the volumes"):
        found.up()
    assert api.up(found.name, heal=lambda found: None)["gap"] is None
    assert found.sql("select n from kept") == [(1,)]


def test_what_stands_in_the_way_of_healing_is_said(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = small(make_set, binaries_of, "ext4")
    with pytest.raises(PreconditionError, match="is attached"):
        api.up(found.name, heal=lambda found: None)
    api.down(found.name)
    with (
        mounted_plain(found, found.config.volumes[0]),
        pytest.raises(PreconditionError, match="is still mounted at"),
    ):
        api.up(found.name, heal=lambda found: None)


def test_changed_before_the_first_image_is_complete_it_is_begun_anew(make_set: MakeSet, binaries_of: BindirOf) -> None:
    stopped = "canceling statement due to user request"  # the agent's, when it is ended as it asks
    found = make_set(binaries_of(15), size=384 << 20, protect=False, allowed=[stopped])
    protection.protect(ProtectRequest(
        found.name, found.pgdata, found.store, size=384 << 20, initdb=True, yes=True, version=15, journal_limit=1 << 30,
        bindir=found.binaries.directory, initdb_options=("--data-checksums", "--auth=trust"),
        settings=tuple(found.place({}).items()),
    ))  # fmt: skip
    attach.up(found.config)
    for begun in (False, True):
        if begun:
            service.start(found.config)
            service.stop(found.config)
            assert found.source().store.baseline is None, "it was quicker than this test"
        attach.down(found.config)
        with mounted_plain(found, found.config.volumes[0]) as place:
            (place / f"foreign-{begun}").write_bytes(b"x" * 9999)
        with pytest.raises(PreconditionError, match="was changed"):
            attach.up(found.config)
        told: list[Differences] = []
        assert healing.heal(found.config, scratch_below(found.root), told.append) is None
        assert told[0].volumes == {}
        attach.up(found.config)
    service.start(found.config)
    api.wait_baseline(found.config, lambda moment: None)
    api.cut(found.name)
    assert api.info(found.name)["gaps"] == []
    api.down(found.name)
    found.assert_volume_is_newest()
