"""A cluster on several volumes: pg_wal and tablespaces inside and elsewhere, put behind capture and taken out again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from pgcdp import config as settings
from pgcdp import proc
from pgcdp.capture import attach, held, protect, volumes
from pgcdp.capture.checks import ProtectRequest
from pgcdp.capture.planning import Backing
from pgcdp.config import Config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres import cluster, session
from pgcdp.progress import Progress
from tests.fix_house import MIB, House, assert_as_before, run_until

ROWS = 2000


@dataclass
class Spread:
    """A house whose cluster has pg_wal and two tablespaces elsewhere, each with a table of ROWS rows."""

    house: House

    @property
    def wal(self) -> Path:
        return self.house.root / "elsewhere" / "wal"

    @property
    def fast(self) -> Path:
        return self.house.root / "elsewhere" / "fast"

    @property
    def slow(self) -> Path:
        return self.house.root / "slow"

    def request(self, **changes: object) -> ProtectRequest:
        """All three on volumes of their own, one of another filesystem."""
        values: dict[str, object] = {
            "wal_size": 256 * MIB,
            "tablespaces": (("fast", Backing(None, 64 * MIB)), ("Slow One", Backing(None, 304 * MIB))),
            "fs_of": (("Slow One", "xfs"),),
            **changes,
        }
        return self.house.request(**values)

    def counts(self) -> list[int]:
        with self.house.connect() as session:
            tables = ("quick", "lazy", "ledger")
            rows = [session.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() for table in tables]
        return [row[0] for row in rows if row is not None]

    def assert_plain(self) -> None:
        assert_as_before(self.house)
        assert self.counts() == [ROWS, ROWS, 1000]
        assert sorted(path.name for path in self.wal.parent.iterdir()) == ["fast", "wal"]
        assert (self.house.pgdata / "pg_wal").readlink() == self.wal
        for place in (self.wal, self.fast, self.slow):
            status = place.stat()
            assert (status.st_uid, status.st_mode & 0o777) == (self.house.user.uid, 0o700)
            assert not (place / "lost+found").exists()

    def assert_protected(self, config: Config) -> None:
        assert attach.is_attached(config)
        assert self.counts() == [ROWS, ROWS, 1000]
        for place in (self.house.root, self.wal.parent):
            assert [path.name for path in place.iterdir() if ".pgcdp-" in path.name] == []
        for place in (self.house.pgdata, self.wal, self.fast, self.slow):
            assert volumes.mount_at(place) is not None
        attach.down(config)
        for place in (self.house.pgdata, self.wal, self.fast, self.slow):
            assert list(place.iterdir()) == [], "what is written there now would be hidden by the volume"
        attach.up(config)
        assert self.counts() == [ROWS, ROWS, 1000]


@pytest.fixture
def spread(house: House) -> Spread:
    made = Spread(house)
    for place in (made.wal.parent, made.fast, made.slow):
        place.mkdir(mode=0o700)
        os.chown(place, house.user.uid, house.user.gid)
    cluster.stop(house.pgdata)
    (house.pgdata / "pg_wal").rename(made.wal)
    (house.pgdata / "pg_wal").symlink_to(made.wal)
    house.start()
    with house.connect() as session:
        session.execute(f"CREATE TABLESPACE fast LOCATION '{made.fast}'")
        session.execute(f"""CREATE TABLESPACE "Slow One" LOCATION '{made.slow}'""")
        session.execute(f"CREATE TABLE quick TABLESPACE fast AS SELECT generate_series(1, {ROWS}) AS n")
        session.execute(f"""CREATE TABLE lazy TABLESPACE "Slow One" AS SELECT generate_series(1, {ROWS}) AS n""")
    return made


# --- there and back


def test_there_killed_and_back(spread: Spread) -> None:
    """Everything keeps its path; a crash of capture loses nothing on any of the volumes."""
    config = protect.protect(spread.request())
    assert [(each.name, each.fs, each.mountpoint) for each in config.volumes] == [
        ("data", "ext4", spread.house.pgdata),
        ("wal", "ext4", spread.wal),
        ("ts-fast", "ext4", spread.fast),
        ("ts-slow-one", "xfs", spread.slow),
    ]
    assert config == settings.load_config("main")
    spread.assert_protected(config)
    held.cut_off(config.paths)
    attach.up(config)
    spread.assert_protected(config)
    protect.unprotect(config)
    spread.assert_plain()


def test_a_stopped_cluster_names_its_tablespaces_by_number(spread: Spread) -> None:
    """Names are in the catalogs, which nobody reads while it does not run."""
    cluster.stop(spread.house.pgdata)
    with pytest.raises(PgcdpError, match='no tablespace "fast"') as caught:
        protect.protect(spread.request())
    assert "names are known of a cluster that runs" in str(caught.value.hint)
    oids = {place: oid for oid, place in cluster.tablespace_links(spread.house.pgdata).items()}
    spaces = ((str(oids[spread.fast]), Backing(None, 64 * MIB)), (str(oids[spread.slow]), Backing(None, 64 * MIB)))
    config = protect.protect(spread.request(tablespaces=spaces, fs_of=()))
    assert [each.name for each in config.volumes][2:] == [f"ts-{oids[spread.fast]}", f"ts-{oids[spread.slow]}"]
    spread.assert_protected(config)
    attach.stop_cluster(config)
    protect.unprotect(config)
    spread.house.start()
    spread.assert_plain()


def test_a_cluster_of_debian_with_its_configuration_elsewhere(house: House) -> None:
    """pg_ctlcluster knows it by /etc alone: what it starts, stops and says must be the same cluster on both sides."""
    version, name = "15", f"pgcdp{os.getpid()}"
    etc = Path("/etc/postgresql") / version / name
    pgdata = house.root / "debian"
    options = ["--datadir", str(pgdata), "--port", str(house.port + 1), "--socketdir", str(house.root / "socket")]
    log = ["--logfile", str(house.root / "debian.log")]
    proc.run(["pg_createcluster", "--user", "postgres", *options, *log, version, name])

    def ctl(verb: str, *more: str) -> None:
        proc.run(["pg_ctlcluster", version, name, verb, *more])

    def count() -> tuple[int, ...] | None:
        place = str(house.root / "socket")
        user = proc.user_named("postgres")
        with session.connect_as_client(session.Dsn(Path(place), house.port + 1, owner=user)) as connection:
            return connection.execute("select count(*) from t").fetchone()

    try:
        ctl("start")
        with session.connect_as_client(
            session.Dsn(house.root / "socket", house.port + 1, owner=proc.user_named("postgres"))
        ) as connection:
            connection.execute("create table t as select generate_series(1, 100)")
        config = protect.protect(house.request(pgdata=pgdata, wal_size=256 * MIB))
        assert not (pgdata / "postgresql.conf").exists()
        assert f"config_file={etc}/postgresql.conf" in " ".join(config.cluster.command_line)
        assert count() == (100,)
        ctl("stop", "-m", "fast")
        ctl("start")
        assert count() == (100,)
        attach.down(config)
        attach.up(config)
        assert count() == (100,)
        protect.unprotect(config)
        assert count() == (100,)
        ctl("stop", "-m", "fast")
    finally:
        cluster.kill_leftovers(pgdata)
        with suppress(PgcdpError):
            attach.discard(settings.load_config("main"))
        proc.run(["pg_dropcluster", version, name], check=False)
        shutil.rmtree(etc, ignore_errors=True)


# --- refused

Change = Callable[[Spread], ProtectRequest]


def _linked_database(spread: Spread) -> ProtectRequest:
    """What some did before there were tablespaces."""
    cluster.stop(spread.house.pgdata)
    (spread.house.pgdata / "base" / "1").rename(spread.house.root / "one")
    (spread.house.pgdata / "base" / "1").symlink_to(spread.house.root / "one")
    spread.house.start()
    return spread.request()


def _left_over(spread: Spread) -> ProtectRequest:
    (spread.fast.parent / "fast.pgcdp-before-main").mkdir()
    return spread.request()


def _too_small(spread: Spread) -> ProtectRequest:
    (spread.fast / "more").write_bytes(os.urandom(80 * MIB))
    return spread.request()


FAST, SLOW = ("fast", Backing(None, 64 * MIB)), ("Slow One", Backing(None, 304 * MIB))
NULL = Backing(Path("/dev/null"), None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda spread: spread.request(wal_size=None), "pg_wal is a link to .*/wal"),
        (lambda spread: spread.request(tablespaces=(FAST,), fs_of=()), 'tablespace "Slow One" lies outside'),
        (lambda spread: spread.request(tablespaces=(FAST, SLOW, ("none", FAST[1]))), 'no tablespace "none"'),
        (lambda spread: spread.request(tablespaces=(FAST, SLOW, FAST)), 'tablespace "fast" is named twice'),
        (lambda spread: spread.request(fs_of=(("other", "xfs"),)), "--fs other=xfs names no volume"),
        (lambda spread: spread.request(fs_of=(("fast", "xfs"),)), "xfs needs 300"),
        (_too_small, "fast has 8.* which does not fit"),
        (lambda spread: spread.request(store=spread.fast / "store"), "inside the tablespace directory"),
        (lambda spread: spread.request(tablespaces=(FAST, (SLOW[0], NULL))), "is not a block device"),
        (_linked_database, "base/1 lies outside"),
        (_left_over, "fast.pgcdp-before-main exists"),
    ],
)
def test_refused_and_nothing_changed(spread: Spread, change: Change, told: str) -> None:
    request = change(spread)
    before = spread.house.picture()
    with pytest.raises(PgcdpError, match=told) as caught:
        protect.protect(request)
    assert caught.value.exit_code in (2, 6)
    assert caught.value.hint
    assert spread.house.picture() == before
    assert spread.counts() == [ROWS, ROWS, 1000]


def test_one_device_for_two_volumes_is_refused(spread: Spread) -> None:
    """Two filesystems on one device would be one heap of rubble."""
    volumes.make_image(spread.house.root / "disk", 304 * MIB)
    device = volumes.attach_loop(spread.house.root / "disk")
    (spread.house.root / "alias").symlink_to(device)
    spaces = (("fast", Backing(device, None)), ("Slow One", Backing(spread.house.root / "alias", None)))
    with pytest.raises(PgcdpError, match="name the same device"):
        protect.protect(spread.request(tablespaces=spaces))


def test_a_tablespace_made_while_protect_works_is_not_left_out(spread: Spread) -> None:
    """Between the checks and the stop anybody can make one; it would be captured by nobody."""
    late = spread.house.root / "late"
    late.mkdir()
    os.chown(late, spread.house.user.uid, spread.house.user.gid)

    def make(step: Progress) -> None:
        if step.step == "stopping Postgres" and not any(late.iterdir()):
            with spread.house.connect() as session:
                session.execute(f"CREATE TABLESPACE late LOCATION '{late}'")

    with pytest.raises(PreconditionError, match=r"lies outside the data directory, in .*/late"):
        protect.protect(spread.request(), make)
    spread.assert_plain()


# --- killed


@pytest.mark.parametrize(
    ("step", "nth", "outcome"),
    [
        ("making the volume", 1, "unprotected"),
        ("copying the cluster", 2, "unprotected"),
        ("switching to the volume", 1, "unprotected"),
        ("switching to the volume", 3, "unprotected"),
        ("attaching the volumes", 1, "unprotected"),
        ("starting Postgres", 1, "protected"),
        ("removing the old copy", 2, "protected"),
    ],
)
def test_a_killed_protect_is_put_back_or_finished(spread: Spread, step: str, nth: int, outcome: str) -> None:
    """Each place by itself is before or behind its switch; the set is protected or not, as one."""
    run_until("protect", step, spread.request(), nth)
    assert protect.recover("main") == outcome
    assert protect.recover("main") is None
    if outcome == "unprotected":
        spread.assert_plain()
    else:
        spread.assert_protected(settings.load_config("main"))


@pytest.mark.parametrize(
    ("step", "nth", "outcome"),
    [
        ("copying to plain storage", 2, "protected"),
        ("unmounting", 1, "protected"),
        ("switching to plain storage", 3, "unprotected"),
        ("starting Postgres", 1, "unprotected"),
        ("removing volume and journal", 1, "unprotected"),
    ],
)
def test_a_killed_unprotect_is_put_back_or_finished(spread: Spread, step: str, nth: int, outcome: str) -> None:
    config = protect.protect(spread.request())
    run_until("unprotect", step, spread.request(), nth)
    assert protect.recover("main") == outcome
    if outcome == "unprotected":
        spread.assert_plain()
    else:
        spread.assert_protected(config)
