"""Who is not root can read a copy of a store; what he cannot do is said before anything is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgcdp import api, proc
from pgcdp.records import Target
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet


@pytest.fixture
def copied(make_set: MakeSet, binaries_of: BindirOf) -> tuple[ProtectedSet, Path]:
    """A set, and a copy of its store that belongs to user nobody."""
    found = make_set(binaries_of(15), size=384 << 20)
    found.sql("create table t as select generate_series(1, 100) n")
    api.cut(found.name)
    found.sql("delete from t")
    api.cut(found.name)
    place = found.root / "nobody"
    place.mkdir()
    shutil.copytree(found.store, place / "store")
    user = proc.user_named("nobody")
    for path in (place, *place.rglob("*")):
        os.chown(path, user.uid, user.gid)
    return found, place


def run(place: Path, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    user = proc.user_named("nobody")
    return subprocess.run(
        [sys.executable, "-P", "-m", "pgcdp", *words],
        env={**os.environ, "PGCDP_ROOT": str(root), "HOME": str(place)},
        user=user.uid, group=user.gid, extra_groups=[], cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip


READING = (["info"], ["log"], ["find", "delete from t"], ["check"], ["check", "--full"])
MOUNTING = (
    ["verify"], ["verify", "--sample", "1"], ["clone"], ["salvage", "--table", "t", "--file", "{place}/t.csv"],
    ["restore", "--to-directory", "{place}/data"],
)  # fmt: skip


def test_a_copy_of_a_store_is_read_by_whom_it_belongs_to(copied: tuple[ProtectedSet, Path]) -> None:
    found, place = copied
    store = ["--store", str(place / "store")]
    own = found.config.paths.root
    for words in READING:
        for root in (own, place / "root", Path("/")):  # root's notes, his own, and those that there may be here
            done = run(place, root, *words, *store)
            assert (done.returncode, "error" in done.stderr) == (0, False), (words, root, done.stderr)
    done = run(place, own, "restore", *store, "--target-boundary", "1", "--to-image", str(place / "image"))
    assert done.returncode == 0, done.stderr
    (wanted,) = found.restored(Target("boundary", 1))
    assert (place / "image").read_bytes() == wanted.read_bytes()


def test_what_mounts_is_refused_beforehand(copied: tuple[ProtectedSet, Path]) -> None:
    found, place = copied
    before = sorted(place.iterdir())
    for words in MOUNTING:
        filled = [word.format(place=place) for word in words]
        done = run(place, place / "root", *filled, "--store", str(place / "store"))
        assert done.returncode == 6, (words, done.stderr)
        assert "but mounts need root" in done.stderr, (words, done.stderr)
        assert sorted(each for each in place.iterdir() if each.name != "root") == before, words
    for words in (["status"], ["cut"], ["mark", "x"], ["down"], ["up"], ["check"], ["expire", "--dry-run"]):
        done = run(place, found.config.paths.root, *words)
        assert done.returncode == 6, (words, done.stderr)
        assert "run pgcdp as root" in done.stderr, (words, done.stderr)
