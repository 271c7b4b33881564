"""A cluster of Debian's pg_ctlcluster, configured in /etc: nothing reads that by mistake, nothing loses it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from pgcdp import api, proc
from pgcdp.fsio import write_atomic
from pgcdp.postgres import cluster
from pgcdp.postgres.configuration_files import for_a_copy, read_outside, text_of
from pgcdp.records import Target
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import PORT, MakeSet, ProtectedSet
from tests.scratch import scratch_directory

OTHER_PORT = PORT + 57


@pytest.fixture
def debian(make_set: MakeSet, binaries_of: BindirOf) -> Iterator[tuple[ProtectedSet, Path]]:
    """A protected cluster, and where its configuration is."""
    found = make_set(binaries_of(15), protect=False)
    version, name = "15", f"pgcdp{os.getpid()}"
    etc = Path("/etc/postgresql") / version / name
    places = [
        "--datadir",
        str(found.pgdata),
        "--socketdir",
        str(found.sockets),
        "--logfile",
        str(found.root / "pg.log"),
    ]
    try:
        proc.run(["pg_createcluster", "--user", "postgres", "--port", str(PORT), *places, version, name])
        (etc / "pg_hba.conf").write_text("local all all trust\n")
        (etc / "conf.d" / "shop.conf").write_text("work_mem = '7MB'\nshop.tenant = 'north'\nTimeZone = 'Asia/Tokyo'\n")
        proc.run(["pg_ctlcluster", version, name, "start"])
        api.protect(found.name, found.pgdata, found.store, size=384 << 20, yes=True, journal_limit=2 << 30)
        yield found, etc
        proc.run(["pg_ctlcluster", version, name, "stop", "-m", "fast"])
        api.down(found.name)
    finally:
        cluster.kill_leftovers(found.pgdata)
        proc.run(["pg_dropcluster", version, name], check=False)
        shutil.rmtree(etc, ignore_errors=True)


def sums(etc: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in etc.rglob("*") if path.is_file() and not path.is_symlink()}


ASKED = (
    "select count(*), current_setting('work_mem'), current_setting('shop.tenant'), current_setting('TimeZone') from t"
)


def test_it_is_cloned_proven_rewound_and_restored_with_its_configuration(debian: tuple[ProtectedSet, Path]) -> None:
    found, etc = debian
    found.sql("create table t as select generate_series(1, 7) n")
    api.cut(found.name)
    found.sql("delete from t")
    before = sums(etc)
    as_it_was = (7, "7MB", "north", "Asia/Tokyo")
    made = api.clone(found.name, Target("newest"), before="delete from t")
    with psycopg.connect(made["dsn"]) as connection:
        assert connection.execute(ASKED).fetchone() == as_it_was
        places = connection.execute("select name from pg_settings where setting like '/etc/postgresql%'").fetchall()
    assert places == [], "nothing of it is read there"
    api.destroy(made["name"])
    assert api.verify(found.name, Target("newest"))["ok"]

    place = found.root / "restored"
    told = api.restore(found.name, Target("newest"), before="delete from t", to_directory=place)
    assert told["configured"]
    assert {each["file"]: each["from"] for each in told["configuration"]} == {
        name: str(etc / name) for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf")
    }
    restored = place / "postgresql.conf"
    assert (restored.stat().st_uid, restored.stat().st_mode & 0o777) == (postgres_user().uid, 0o600)
    line = cluster.command_line(found.binaries, place, "-p", str(OTHER_PORT))
    cluster.start(line, place, postgres_user(), found.root / "restored.log")
    try:
        with psycopg.connect(f"host={found.sockets} port={OTHER_PORT} dbname=postgres user=postgres") as connection:
            assert connection.execute(ASKED).fetchone() == as_it_was
            for name, wanted in {"data_directory": place, "hba_file": place / "pg_hba.conf"}.items():
                assert connection.execute("select current_setting(%s)", [name]).fetchone() == (str(wanted),)
            assert connection.execute("select count(*) from pg_settings where sourcefile like '/etc/%'").fetchone() == (
                0,
            )
    finally:
        cluster.stop(place)

    told = api.rewind(found.name, Target("newest"), before="delete from t", agree=lambda resolved: None)
    assert told["verified"]
    assert found.sql(ASKED) == [as_it_was]
    api.rewind(found.name, Target("name", name=told["undo"]), agree=lambda resolved: None)
    assert found.sql("select count(*) from t") == [(0,)]
    assert found.sql("show config_file") == [(str(etc / "postgresql.conf"),)]
    assert sums(etc) == before


@pytest.fixture
def place() -> Iterator[Path]:
    path = scratch_directory("etc")
    yield path
    shutil.rmtree(path)


Read = Callable[..., dict[str, bytes]]


@pytest.fixture
def read(place: Path) -> Read:
    """read(config_file=PATH, ...): the texts of what lies outside of a data directory."""

    def reading(**places: Path) -> dict[str, bytes]:
        rows = [{"name": name, "setting": str(path)} for name, path in places.items()]
        found = read_outside({"settings": rows}, place / "data", postgres_user())
        return {name: text_of(kept) for name, kept in found.items()}

    return reading


def written(path: Path, text: str, mode: int = 0o644) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_what_is_included_stands_where_the_include_was(place: Path, read: Read) -> None:
    """The last one that sets something wins, so the order is part of what it says."""
    written(place / "conf.d" / "b.conf", "work_mem = '2MB'\n")
    written(place / "conf.d" / "a.conf", "work_mem = '1MB'\ninclude '../deep.conf'\n")
    written(place / "conf.d" / ".hidden.conf", "work_mem = '9MB'\n")
    written(place / "conf.d" / "notes.txt", "not a setting\n")
    written(place / "deep.conf", "a = 1")
    main = written(
        place / "main.conf",
        "work_mem = '0MB'\ninclude_dir = 'conf.d'   # more\ninclude_if_exists 'gone.conf'\n"
        "  INCLUDE 'deep.conf'\nincluded = on\ninclude 'lost.conf'\nport = 1\n",
    )
    text = read(config_file=main)["postgresql.conf"].decode()
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "work_mem = '0MB'", "work_mem = '1MB'", "a = 1", "work_mem = '2MB'", "a = 1", "included = on",
        "include 'lost.conf'", "port = 1",
    ]  # fmt: skip


def test_a_circle_of_includes_and_large_files_end(place: Path, read: Read) -> None:
    circle = written(place / "circle.conf", "include 'circle.conf'\na = 1\n")
    assert read(config_file=circle)["postgresql.conf"].count(b"\na = 1") == 11
    written(place / "double.conf", "include 'double.conf'\n" * 20 + "x" * 1000)
    large = written(place / "large.conf", "#" + "x" * (1 << 20))
    endless = Path("/dev/zero")
    (place / "conf.d" / "directory.conf").mkdir(parents=True)
    nul = written(place / "nul.conf", "include_dir 'conf.d'\ninclude 'a\0b'\n")
    assert read(config_file=nul) == {}
    assert read(config_file=place / "double.conf", hba_file=large, ident_file=endless) == {}


def test_what_the_owner_may_not_read_is_not_read_for_him(place: Path, read: Read) -> None:
    """Its paths come from him, and what is restored is his."""
    secret = written(place / "secret", "for root alone\n", 0o640)
    for_group = written(place / "group", "for root's group\n", 0o040)
    main = written(place / "main.conf", f"include_if_exists '{secret}'\na = 1\n")
    linked = place / "link.conf"
    linked.symlink_to(secret)
    assert read(config_file=main, hba_file=for_group, ident_file=linked) == {}
    assert read(config_file=written(place / "other.conf", "a = 1\n")) == {"postgresql.conf": b"a = 1\n"}


def test_what_lies_in_the_data_directory_is_left_to_it(place: Path, read: Read) -> None:
    assert read(config_file=written(place / "data" / "postgresql.conf", "a = 1\n")) == {}


def test_a_copy_is_not_led_to_production() -> None:
    text = b"data_directory = '/srv'\n Hba_File='/etc/x'\n# ident_file\nport = 1\nexternal_pid_file = 'p'"
    kept = [line for line in for_a_copy(text).splitlines() if not line.startswith(b"#")]
    assert kept == [b"port = 1"]


def test_a_link_in_the_data_directory_is_not_followed_by_root(place: Path) -> None:
    """What the owner leaves there under the name of the file to come would be overwritten, and become his."""
    victim = written(place / "victim", "of root", 0o600)
    (place / ".postgresql.conf.new").symlink_to(victim)
    (place / "postgresql.conf").symlink_to(victim)
    write_atomic(place / "postgresql.conf", b"his", owner=(postgres_user().uid, postgres_user().gid))
    assert (victim.read_text(), victim.stat().st_uid) == ("of root", 0)
    assert (place / "postgresql.conf").read_text() == "his"
    assert not (place / "postgresql.conf").is_symlink()
