"""What lies outside of a cluster's volumes is found whatever way it got there, and nothing else is called so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pgcdp.capture import outside
from pgcdp.capture.outside import Looker, Outside, find_outside

Change = Callable[[Path, Path], Path]


@pytest.fixture
def pgdata(tmp_path: Path) -> Path:
    """The bones of a data directory, with two volumes: itself and the place of a tablespace."""
    place = tmp_path / "data"
    for name in ("base/1", "base/5", "global", "pg_wal/archive_status", "pg_xact", "pg_tblspc", "pg_stat_tmp", "log"):
        (place / name).mkdir(parents=True)
    (place / "base/5/16384").touch()
    (tmp_path / "space/PG_15_202209061/5").mkdir(parents=True)
    (tmp_path / "space/PG_15_202209061/5/16400").touch()
    (place / "pg_tblspc/16390").symlink_to(tmp_path / "space")
    return place


def moved(name: str) -> Change:
    """Something is moved to another place, and a link is left."""

    def change(pgdata: Path, elsewhere: Path) -> Path:
        target = elsewhere / Path(name).name
        (pgdata / name).rename(target)
        (pgdata / name).symlink_to(target)
        return target

    return change


def tablespace(pgdata: Path, elsewhere: Path) -> Path:
    (pgdata / "pg_tblspc/16500").symlink_to(elsewhere)
    return elsewhere


def behind_a_link_inside(pgdata: Path, elsewhere: Path) -> Path:
    """A link that leads inside, and from there out."""
    (pgdata / "base/16600").symlink_to(pgdata / "base/here")
    (pgdata / "base/here").symlink_to(elsewhere)
    return elsewhere


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (tablespace, ["pg_tblspc/16500"]),
        (moved("pg_wal"), ["pg_wal"]),
        (moved("pg_wal/archive_status"), ["pg_wal/archive_status"]),
        (moved("pg_xact"), ["pg_xact"]),
        (moved("base"), ["base"]),
        (moved("base/5"), ["base/5"]),
        (moved("base/5/16384"), ["base/5/16384"]),
        (moved("pg_tblspc/16390/PG_15_202209061/5/16400"), ["pg_tblspc/16390/PG_15_202209061/5/16400"]),
        (behind_a_link_inside, ["base/16600", "base/here"]),
        (moved("pg_stat_tmp"), []),
        (moved("log"), []),
    ],
)
def test_each_way_out_is_found(pgdata: Path, tmp_path: Path, change: Change, names: list[str]) -> None:
    mountpoints = [pgdata, tmp_path / "space"]
    assert find_outside(pgdata, mountpoints) == []
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = change(pgdata, elsewhere)
    assert find_outside(pgdata, mountpoints) == [Outside(name, place) for name in names]


def test_a_tablespace_that_is_on_no_volume(pgdata: Path, tmp_path: Path) -> None:
    assert find_outside(pgdata, [pgdata]) == [Outside("pg_tblspc/16390", tmp_path / "space")]


def test_looking_writes_nothing(pgdata: Path, tmp_path: Path) -> None:
    """What it wrote would be captured, at each cut."""
    directories = [pgdata, *(path for path in pgdata.rglob("*") if path.is_dir())]
    for directory in directories:
        os.utime(directory, ns=(1, os.stat(directory).st_mtime_ns))
    find_outside(pgdata, [pgdata, tmp_path / "space"])
    assert {os.stat(directory).st_atime_ns for directory in directories} == {1}


def test_nothing_is_known_of_what_is_not_mounted(pgdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty mount point is not a cluster without tablespaces."""
    assert Looker(pgdata, [pgdata]).soon(60) is None
    monkeypatch.setattr(outside, "all_mounted", lambda mountpoints: True)
    assert Looker(pgdata, [pgdata]).soon(60) == [Outside("pg_tblspc/16390", tmp_path / "space")]
