"""A stale disk of the same filesystem under a volume, behind a crash: refused, and what the refusal names mends it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pgcdp import api
from pgcdp.capture import stale, volumes
from pgcdp.errors import PreconditionError
from tests.crash.test_kill_set import ALLOWED
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet, first_difference

SETTINGS = {"max_wal_size": "64MB", "min_wal_size": "32MB", "shared_buffers": "32MB"}


def with_older_copies(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> tuple[ProtectedSet, dict[str, Path]]:
    """A set that has crashed, and a copy of each of its volumes as it was at a crash before."""
    found = make_set(
        binaries_of(15), fs=fs, size=384 << 20, wal_size=320 << 20, settings=SETTINGS, allowed=[*ALLOWED, r"the agent"]
    )
    found.sql("create table kept as select n, repeat('x', 200) from generate_series(1, 1000) as n")
    found.kill_both()
    copies = {each.name: found.root / f"{each.name}.older" for each in found.config.volumes}
    for each in found.config.volumes:
        shutil.copyfile(each.backing, copies[each.name])
    found.up()
    found.sql("insert into kept select n, repeat('y', 200) from generate_series(1001, 3000) as n")
    found.sql("checkpoint")
    found.sql("update kept set repeat = repeat('z', 200) where n % 7 = 0")
    found.engine.sync()
    found.sql("insert into kept values (0)")
    found.kill_both()
    return found, copies


def assert_refused(found: ProtectedSet, name: str) -> PreconditionError:
    """Nothing runs, and nothing of the set has changed."""
    files = [*(each.backing for each in found.config.volumes), *sorted(found.config.journal.iterdir())]
    before = [(each, each.stat().st_mtime_ns, each.stat().st_ctime_ns) for each in files]
    with pytest.raises(PreconditionError, match=f"volume {name} of main on .* is not what it was: ") as told:
        found.up()
    assert told.value.exit_code == 6
    with pytest.raises(PreconditionError, match="is not what it was"):
        api.down(found.name)
    assert [(each, each.stat().st_mtime_ns, each.stat().st_ctime_ns) for each in files] == before
    assert not found.capturing()
    assert volumes.mount_at(found.pgdata) is None
    return told.value


@pytest.mark.parametrize(("fs", "name"), [("ext4", "data"), ("xfs", "wal")])
def test_an_older_copy_behind_a_crash(
    make_set: MakeSet, binaries_of: BindirOf, caplog: pytest.LogCaptureFixture, fs: str, name: str
) -> None:
    """The right disk back in its place is taken. Without it, the volume is written anew as the message says."""
    found, copies = with_older_copies(make_set, binaries_of, fs)
    (volume,) = [each for each in found.config.volumes if each.name == name]
    right = volume.backing.rename(found.root / "right")
    copies[name].rename(volume.backing)
    told = assert_refused(found, name)
    aside = f"{volume.backing}.old"
    assert f"mv {volume.backing} {aside}, and then pgcdp up main --remake {name} writes" in str(told.hint)
    stored = shutil.copyfile(right, found.root / "stored")

    volume.backing.rename(aside)
    right.rename(volume.backing)
    caplog.clear()
    with caplog.at_level("INFO", stale.__name__):
        found.up()
    assert "blocks of main compared with the journal, in " in caplog.text
    assert found.sql("select count(*) from kept") == [(3001,)]
    found.amcheck()
    found.sql("insert into kept values (-1)")
    found.engine.sync()
    found.kill_both()

    stored.rename(volume.backing)
    assert_refused(found, name)
    volume.backing.unlink()
    api.up(found.name, remake=[name])
    assert found.sql("select count(*) from kept") == [(3002,)]
    found.amcheck()
    found.wait_following()
    api.cut(found.name)
    assert [each for each in api.check(found.name)["checks"] if not each["ok"]] == []
    api.down(found.name)
    found.assert_volume_is_newest()
    found.up()


def test_both_of_the_same_older_moment(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """What a machine set back in part is, but for the journal; both are named, and both are made again."""
    found, copies = with_older_copies(make_set, binaries_of, "ext4")
    for volume in found.config.volumes:
        volume.backing.rename(found.root / f"{volume.name}.right")
        copies[volume.name].rename(volume.backing)
    told = assert_refused(found, "wal")
    assert "volume data of main" in told.message
    assert "pgcdp up main --remake data --remake wal writes" in str(told.hint)
    for volume in found.config.volumes:
        volume.backing.unlink()
    api.up(found.name, remake=["data", "wal"])
    assert found.sql("select count(*) from kept") == [(3001,)]
    api.down(found.name)
    for volume in found.config.volumes:
        right = found.root / f"{volume.name}.right"
        assert first_difference(volume.backing, right, volume.bytes) is not None, "recovery wrote to it since"
        right.unlink()
    found.assert_volume_is_newest()
    found.up()
