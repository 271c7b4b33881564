"""A set is not taken over from a capture process that is seen to live elsewhere; one that stopped is not waited for."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp.capture import elsewhere, home
from pgcdp.capture.elsewhere import Watch
from pgcdp.config import Config
from pgcdp.errors import PreconditionError
from pgcdp.fsio import write_json
from pgcdp.machine import Place
from pgcdp.progress import silent
from tests.fix_engine import ROOT
from tests.journal_writer import with_checksum
from tests.unit.test_config import sample

BLOCK = 4096


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> Config:
    """A set whose journal is at home on another machine, which did not stop it: direct I/O, as backings need."""
    monkeypatch.setattr(elsewhere, "WATCH_SECONDS", 60.0)  # a look may take long, on a disk that others use, too
    monkeypatch.setattr(elsewhere, "LOOK_SECONDS", 0.02)
    shutil.copytree(ROOT / "tests" / "golden" / "journal", scratch / "journal")
    (scratch / "data.img").write_bytes(bytes(64 * BLOCK))
    one = sample()
    volume = replace(one.volumes[0], backing=scratch / "data.img", bytes=64 * BLOCK)
    config: Config = replace(
        one, journal=scratch / "journal", volumes=(volume,), set_id=set_id_of(scratch / "journal"), root=scratch
    )
    there = replace(Place.here(config.root), machine="f" * 32, hardware="other", host="other")
    write_json(config.journal / home.FILE, there.as_json())
    say_clean(config, clean=False)
    return config


def set_id_of(journal: Path) -> str:
    return (journal / "applied").read_bytes()[16:32].hex()


def say_clean(config: Config, *, clean: bool) -> None:
    """Each slot of the applied mark says whether capture was stopped cleanly."""
    file = config.journal / "applied"
    raw = file.read_bytes()
    slots = []
    for at in (0, BLOCK):
        slot = bytearray(raw[at : at + BLOCK])
        slot[12:16] = int(clean).to_bytes(4, "little")
        slots.append(with_checksum(bytes(slot), 88) if any(slot[:8]) else bytes(slot))
    file.write_bytes(b"".join(slots))


def watched(config: Config) -> float:
    """How long it was watched."""
    begun = time.monotonic()
    Watch(config).end(silent)
    return time.monotonic() - begun


def test_nothing_is_seen_of_one_that_is_dead(away: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "WATCH_SECONDS", 0.6)
    assert watched(away) >= elsewhere.WATCH_SECONDS


def test_after_a_clean_stop_and_at_home_nothing_is_watched(away: Config) -> None:
    say_clean(away, clean=True)
    assert watched(away) < elsewhere.WATCH_SECONDS
    say_clean(away, clean=False)
    home.move(away)
    assert watched(away) < elsewhere.WATCH_SECONDS


def a_batch(config: Config) -> None:
    with (config.journal / "0000000000000003.seg").open("r+b") as segment:
        segment.seek(0, os.SEEK_END)
        segment.write(bytes(BLOCK))


def a_mark(config: Config) -> None:
    os.utime(config.journal / "applied")


def a_block(config: Config) -> None:
    with config.volumes[0].backing.open("r+b") as backing:
        backing.write(b"x")
        os.fsync(backing.fileno())


@pytest.mark.parametrize("write", [a_batch, a_mark, a_block])
def test_what_it_writes_is_seen(away: Config, write: Callable[[Config], None]) -> None:
    watch = Watch(away)
    assert watch.look()
    write(away)
    with pytest.raises(PreconditionError, match="is in use by a capture process elsewhere, which has just written to"):
        watch.end(silent)


@pytest.mark.parametrize("clean", [True, False])
def test_its_lock_is_seen_where_locks_reach(away: Config, clean: bool) -> None:
    say_clean(away, clean=clean)
    with (away.journal / "lock").open("w") as lock:
        watch = Watch(away)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PreconditionError, match="which has it locked"):
            watch.end(silent)
