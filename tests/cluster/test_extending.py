"""A tablespace made since is taken into the set; killed anywhere, it is in or out, and no write is lost either way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from pgcdp import api, extending
from pgcdp import config as settings
from pgcdp.capture import attach, volumes
from pgcdp.capture.planning import Backing
from pgcdp.config import Config
from pgcdp.errors import PgcdpError, PreconditionError, UsageError
from pgcdp.postgres import cluster
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Span, Target
from pgcdp.store.retention import Plan
from tests.cluster.test_expire import carry_out
from tests.cluster.test_outside import NOISE, new_space
from tests.fix_disks import MakeDisk
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("no_clone_stays")
WHILE_DOWN = [
    *NOISE, *KILLED, r"the tablespace in .* is not taken into main",
    r"terminating connection due to unexpected postmaster exit",
]  # fmt: skip


@pytest.fixture
def late(make_disk: MakeDisk, make_set: MakeSet, binaries_of: BindirOf) -> tuple[ProtectedSet, Path]:
    """A set, and where a tablespace "late" lies that was made since, with a table of 1000 rows."""
    found = make_set(binaries_of(15), allowed=WHILE_DOWN, size=384 * MIB)
    return found, new_space(found, "late")[0]


def rows(found: ProtectedSet) -> int:
    return int(found.sql("select count(*) from in_late")[0][0])


def assert_in(found: ProtectedSet, place: Path) -> None:
    """It is on a volume of the set, and what is written there is captured."""
    found.wait_following()
    assert rows(found) == 1000
    assert volumes.mount_at(place) is not None
    assert not (place / "lost+found").exists()
    assert [path.name for path in place.parent.iterdir()] == ["late"]
    # The stretch to this boundary may lack it, or nobody could look at the one before: volumes were unmounted there.
    assert api.cut(found.name)["outside"] in ([], None, [{"name": place_name(found), "place": str(place)}])
    assert api.cut(found.name)["outside"] == []
    found.sql("insert into in_late values (0)")
    point = found.durable()
    found.sql("delete from in_late where n = 0")
    with found.running_at(Target("write", point)) as box, box.connect() as session:
        assert session.execute("select count(*) from in_late").fetchone() == (1001,)
    assert api.verify(found.name, Target("newest"))["ok"]


def there_and_back(found: ProtectedSet) -> None:
    """A rewind while the store has a volume that was put back: production has no device for it, and an image none."""
    point = found.durable()
    found.sql("create table behind as select 1 as n")
    told = api.rewind(found.name, Target("write", point), agree=lambda told: None, prove=False)
    assert found.sql("select to_regclass('behind')") == [(None,)]
    api.rewind(found.name, Target("name", name=told["undo"]), agree=lambda told: None, prove=False)
    assert found.sql("select n from behind") == [(1,)]
    found.wait_following()
    api.restore(found.name, Target("write", point), to_image=found.root / "image")
    assert (found.root / "image").is_file()
    (found.root / "image").unlink()


def place_name(found: ProtectedSet) -> str:
    oid = found.sql("select oid from pg_tablespace where spcname = 'late'")[0][0]
    return f"pg_tblspc/{oid}"


def assert_out(found: ProtectedSet, place: Path) -> None:
    """As it was before."""
    found.wait_following()
    assert rows(found) == 1000
    assert volumes.mount_at(place) is None
    assert [path.name for path in place.parent.iterdir()] == ["late"]
    assert [volume.name for volume in found.config.volumes] == ["data"]
    assert [path.name for path in found.config.paths.volumes.iterdir()] == ["data.img"]
    assert len(api.cut(found.name)["outside"]) == 1
    assert not api.status(found.name)["error"]


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_tablespace_made_since_is_taken_in(late: tuple[ProtectedSet, Path], make_disk: MakeDisk, fs: str) -> None:
    """Also into points behind it, in a clone opened before it came, and out again with the rest."""
    found, place = late
    first, before = api.info(found.name)["recovery_window"]["from_write"], found.durable()
    api.cut(found.name)
    found.sql("create table told as select 1 as n")
    outside = found.durable()
    clone = api.clone(found.name, Target("boundary", 0), name="old")
    backing = Backing(make_disk(304 * MIB), None) if fs == "xfs" else Backing(None, 304 * MIB)
    told = api.add_tablespaces(found.name, [("late", backing)], fs=fs, yes=True)
    assert [volume["name"] for volume in told["volumes"]] == ["data", "ts-late"]
    assert_in(found, place)

    # The clone goes on while the image moves over intervals with a volume that it does not know.
    with psycopg.connect(clone["dsn"]) as session:
        assert session.execute("select count(*) from pg_class where relname = 'in_late'").fetchone() == (0,)
    assert api.clones()["clones"][0]["state"] == "running"
    api.destroy("old")

    # Before that, it was outside, and that is said; images have the volume as it was then: empty.
    with pytest.raises(PreconditionError, match="not part of what was restored"):
        api.verify(found.name, Target("write", outside))
    api.restore(found.name, Target("write", before), to_image=found.root / "images")
    assert not any((found.root / "images" / "ts-late.img").read_bytes())
    with pytest.raises(PreconditionError, match="volume ts-late is in the set since write"):
        api.rewind(found.name, Target("write", before), agree=lambda told: None)
    # Before it was made there was nothing in its place.
    told = api.rewind(found.name, Target("write", first), agree=lambda told: None)
    assert told["verified"]
    assert found.sql("select count(*) from pg_tablespace where spcname = 'late'") == [(0,)]
    assert api.rewind(found.name, Target("name", name=told["undo"]), agree=lambda told: None)["verified"]
    assert rows(found) == 1000
    with pytest.raises(UsageError, match="is in the set already"):
        api.add_tablespaces(found.name, [("late", Backing(None, 304 * MIB))])

    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)
    assert all(each["ok"] for each in api.check(found.name, full=True)["checks"])
    api.unprotect(found.name)
    assert rows(found) == 1000
    found.sql("checkpoint")
    cluster.stop(found.pgdata)


@pytest.mark.timeout(900)
def test_retention_of_what_was_before_a_volume_came_and_behind(late: tuple[ProtectedSet, Path]) -> None:
    """Boundaries from before it open without it, thinned, joined over its coming, and as the oldest one."""
    found, place = late
    found.sql("drop table in_late")
    found.sql("drop tablespace late")
    found.sql("create table told as select generate_series(1, 10) as n")
    whole = int(api.cut(found.name)["number"]) + 1
    assert api.cut(found.name)["number"] == whole
    found.sql(f"create tablespace late location '{place}'")
    found.sql("create table in_late tablespace late as select generate_series(1, 1000) as n")
    lacking = int(api.cut(found.name)["number"])
    (row,) = api.resolve(found.name, Target("boundary", lacking))["outside"]
    api.add_tablespaces(found.name, [("late", Backing(None, 96 * MIB))])
    assert_in(found, place)
    (since,) = found.source().store.since.values()
    joined = next(each.number for each in found.source().intervals() if each.from_write > since)
    assert found.source().intervals()[lacking - 1].to_write < since

    def assert_opens() -> None:
        for number in (whole, joined):
            assert api.verify(found.name, Target("boundary", number))["ok"]
        with found.running_at(Target("boundary", joined)) as box, box.connect() as session:
            assert session.execute("select count(*) from in_late").fetchone() is not None
        with found.running_at(Target("boundary", whole)) as box, box.connect() as session:
            assert session.execute("select count(*) from told").fetchone() == (10,)
            assert session.execute("select to_regclass('in_late')").fetchone() == (None,)
        assert api.resolve(found.name, Target("boundary", whole))["outside"] == []

    assert_opens()
    carry_out(found, Plan(thin=tuple(range(1, joined + 1))))
    assert_opens()
    carry_out(found, Plan(joins=(Span(whole + 1, joined),)))
    assert api.resolve(found.name, Target("boundary", joined))["outside"] == [row]
    assert_opens()
    carry_out(found, Plan(base=whole))
    assert found.source().base().write < since
    assert_opens()
    told = api.rewind(found.name, Target("boundary", whole), agree=lambda told: None, prove=False)
    assert found.sql("select count(*) from pg_tablespace where spcname = 'late'") == [(0,)]
    api.rewind(found.name, Target("name", name=told["undo"]), agree=lambda told: None, prove=False)
    assert rows(found) == 1000
    assert api.rebuild(found.name)["damages"] == []
    assert all(each["ok"] for each in api.check(found.name, full=True)["checks"])
    carry_out(found, Plan(base=joined))
    assert api.resolve(found.name, Target("boundary", joined))["outside"] == [row]
    said = [each["detail"] for each in api.check(found.name)["checks"] if each["name"] == "data outside the set"]
    assert said == ["the oldest boundary is incomplete"]
    with found.running_at(Target("boundary", joined)) as box, box.connect() as session:
        assert session.execute("select count(*) from told").fetchone() == (10,)
    assert api.verify(found.name, Target("newest"))["ok"]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (("none", Backing(None, 304 * MIB)), 'no tablespace "none"'),
        (("late", Backing(None, 32 * MIB)), "needs 64"),
        (("late", Backing(None, 1 << 50)), "1024.0 TiB"),
        (("late", Backing(Path("/dev/null"), None)), "is not a block device"),
        (("late", Backing(None, None)), "exactly one of"),
    ],
)
def test_refused_and_nothing_changed(late: tuple[ProtectedSet, Path], wanted: tuple[str, Backing], told: str) -> None:
    found, place = late
    pid = found.engine.status().pid
    with pytest.raises(PgcdpError, match=told) as caught:
        api.add_tablespaces(found.name, [wanted])
    assert caught.value.exit_code in (2, 6)
    assert caught.value.hint
    assert found.engine.status().pid == pid, "production was not stopped for it"
    assert_out(found, place)


STEPS = ["making the volume", "stopping Postgres", "copying the tablespace", "switching to the volume",
         "starting Postgres", "removing the old copy"]  # fmt: skip
RUNNER = """
import os, signal, sys
from pgcdp import api
from pgcdp.capture.planning import Backing

step, begun = sys.argv[1], False

def report(progress):
    global begun
    begun = begun or progress.step == "making the volume"
    if begun and progress.step == step and progress.done == progress.total:
        os.kill(os.getpid(), signal.SIGKILL)

api.add_tablespaces("main", [("late", Backing(None, 96 << 20))], yes=True, progress=report)
"""


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("engine", ["lives", "killed"])
def test_killed_it_is_in_or_out(late: tuple[ProtectedSet, Path], step: str, engine: str) -> None:
    """Put back, the volume stays in the store without data: the next try goes on from there with the same number."""
    if engine == "killed" and step not in ("copying the tablespace", "starting Postgres"):
        pytest.skip("the two that differ most")
    found, place = late
    found.sql("create table more tablespace late as select repeat('x', 1000) from generate_series(1, 20000)")
    done = subprocess.run([sys.executable, "-c", RUNNER, step], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if engine == "killed" and found.capturing():
        found.kill_engine()
    with pytest.raises(PreconditionError, match="was interrupted"):
        api.down(found.name)
    api.up(found.name)
    found.sql("drop table more")  # the next try has less to copy, and must not find what this one has left
    if STEPS.index(step) < STEPS.index("switching to the volume"):
        assert_out(found, place)
        if step == "copying the tablespace":
            with pytest.raises(PreconditionError, match=r"lies outside of the set, in .*/late: .* could not be undone"):
                api.rewind(found.name, Target("boundary", 0), agree=lambda told: None)
            with pytest.raises(PreconditionError, match=r"without data from an earlier run, of 100663296 bytes"):
                api.add_tablespaces(found.name, [("late", Backing(None, 64 * MIB))])
        api.add_tablespaces(found.name, [("late", Backing(None, 128 * MIB))])
    assert_in(found, place)
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)


def test_a_rewind_beside_a_volume_that_was_put_back(late: tuple[ProtectedSet, Path]) -> None:
    """With what lay outside gone, too: what lies there is captured by nobody, and keeps from rewinding."""
    found, place = late
    done = subprocess.run([sys.executable, "-c", RUNNER, STEPS[2]], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    api.up(found.name)
    assert_out(found, place)
    found.sql("drop table in_late")
    found.sql("drop tablespace late")
    found.wait_following()
    api.cut(found.name)
    there_and_back(found)


@pytest.mark.parametrize("step", ["copying the tablespace", "switching to the volume"])
def test_put_back_without_the_new_volume(late: tuple[ProtectedSet, Path], step: str) -> None:
    """Its disk may be what failed: production comes up all the same, though the journal has writes to it."""
    found, place = late
    found.allowed.append(r"cannot open the backing .*/ts-late\.img of volume ts-late: No such file")
    found.sql("create table more tablespace late as select repeat('x', 1000) from generate_series(1, 20000)")
    done = subprocess.run([sys.executable, "-c", RUNNER, step], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if found.capturing():
        found.kill_engine()
    (found.config.paths.volumes / "ts-late.img").unlink()
    if step == "switching to the volume":  # it is to go forward from there, which cannot be: that is said
        with pytest.raises(PgcdpError, match=r"ts-late\.img"):
            api.up(found.name)
        assert extending.pending(found.config.paths) is None
    else:
        api.up(found.name)
    assert_out(found, place)
    found.kill_engine()
    api.up(found.name)
    assert_out(found, place)


def test_settings_changed_meanwhile_hold(late: tuple[ProtectedSet, Path]) -> None:
    found, place = late
    done = subprocess.run([sys.executable, "-c", RUNNER, STEPS[4]], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    settings.save_config(replace(found.config, compression_level=2))
    api.up(found.name)
    assert_in(found, place)
    assert found.config.compression_level == 2


def test_postgres_that_does_not_start_puts_back(
    late: tuple[ProtectedSet, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the switch, too, as long as it has served nobody."""
    found, place = late
    start, switched = attach.start_cluster, False

    def fail(config: Config, progress: Report = silent) -> None:
        nonlocal switched
        if len(config.volumes) > 1:
            switched = True
            raise PreconditionError("it does not start", "mend it")
        start(config, progress)

    monkeypatch.setattr(attach, "start_cluster", fail)
    with pytest.raises(PreconditionError, match="it does not start"):
        api.add_tablespaces(found.name, [("late", Backing(None, 96 * MIB))])
    monkeypatch.undo()
    assert switched
    assert extending.pending(found.config.paths) is None
    assert_out(found, place)
    api.add_tablespaces(found.name, [("late", Backing(None, 96 * MIB))])
    assert_in(found, place)


def test_a_failure_puts_back(late: tuple[ProtectedSet, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found, place = late

    def fail(step: Progress) -> None:
        if step.step == "copying the tablespace":
            raise OSError(5, "the disk is gone")

    with pytest.raises(PgcdpError, match="the disk is gone"):
        api.add_tablespaces(found.name, [("late", Backing(None, 96 * MIB))], progress=fail)
    assert extending.pending(found.config.paths) is None
    assert_out(found, place)


def test_typed_as_people_type_it(late: tuple[ProtectedSet, Path]) -> None:
    found, place = late
    program = [sys.executable, "-P", "-m", "pgcdp", "protect", "main", "--yes"]
    for words, told in (
        (["--size", "1G"], "missing option --pgdata"),
        (["--tablespace", "late=1G", "--size", "1G"], "--size cannot be given"),
        (["--tablespace", "late=1G", "--fs", "late=xfs"], "of all new volumes"),
    ):
        done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, told in done.stderr) == (2, True), done
    assert_out(found, place)
    subprocess.run([*program, "--tablespace", "late=96M"], check=True, capture_output=True, env=os.environ)
    assert_in(found, place)
