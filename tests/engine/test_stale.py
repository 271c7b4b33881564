"""An older copy under a volume is noticed behind an unclean stop; what a kill may leave is never taken for one."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pgcdp.capture import same_parts, segment, stale, tracked
from pgcdp.config import Config
from pgcdp.errors import PreconditionError
from tests.engine.test_tracking import SMALL, Keeper, fill, heal, healing, journal_of, load, state
from tests.fix_engine import BLOCK, MIB, Capture, Direct, MakeCapture
from tests.model import DISCARD, ZERO, read_mark, read_tracked
from tests.raw_workload import Workload, erase
from tests.waiting import pass_time, wait_until

LARGE = pytest.mark.parametrize("large", [1, 1 << 18])
"""Blocks of what is kept as a range."""


def settings(capture: Capture) -> Config:
    """The set that this is the capture of."""
    state_directory = capture.root / "state"
    paths = SimpleNamespace(state=state_directory, **{
        f"{name}_state": state_directory / name for name in ("extend", "heal", "rewind")
    })  # fmt: skip
    volumes = tuple(
        SimpleNamespace(name=name, backing=capture.backing(name), bytes=size, device=False)
        for name, size in capture.volumes.items()
    )
    return cast(Config, SimpleNamespace(
        name="main", journal=capture.journal, store=capture.root / "store", paths=paths, volumes=volumes,
        set_id_bytes=bytes.fromhex(capture.set_id),
    ))  # fmt: skip


def begun(make_capture: MakeCapture, volumes: dict[str, int] | None = None, **options: Any) -> Capture:
    """One that captures, as it is noted then."""
    capture = make_capture(volumes or {"data": 64 * MIB, "wal": 2 * MIB}, **{"journal_limit": 4096 * MIB, **options})
    capture.start()
    capture.wait_ready()
    same_parts.note(settings(capture))
    return capture


def compared(capture: Capture, caplog: pytest.LogCaptureFixture) -> list[int]:
    """Blocks of each volume that were compared, without finding a difference."""
    caplog.clear()
    with caplog.at_level("INFO", stale.__name__):
        stale.refuse_stale(settings(capture))
    told = [record.message for record in caplog.records if "compared with the journal, in" in record.message]
    return [int(each.rpartition(" ")[2]) for each in told[0].rpartition(": ")[2].split(", ")] if told else []


@contextmanager
def refused(capture: Capture, match: str, name: str = "data") -> Iterator[None]:
    """What is done inside makes the check refuse, which changes nothing."""
    yield
    before = {each: each.read_bytes() for each in (capture.backing(name), *capture.journal.iterdir())}
    with pytest.raises(PreconditionError, match=match) as told:
        stale.refuse_stale(settings(capture))
    assert str(capture.backing(name)) in told.value.message
    assert f"pgcdp up main --remake {name}" in str(told.value.hint)
    assert before == {each: each.read_bytes() for each in (capture.backing(name), *capture.journal.iterdir())}


def put(capture: Capture, block: int, data: bytes, name: str = "data") -> None:
    """Past the engine."""
    with capture.backing(name).open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(data)


def filled(letter: str) -> bytes:
    return letter.encode() * BLOCK


def kill_rounds(make_capture: MakeCapture, caplog: pytest.LogCaptureFixture, rounds: int, seed: int) -> None:
    """So many kills at random moments, each with an older copy tried before what is there."""
    capture = begun(make_capture)
    rng = random.Random(seed)
    seen = noticed = 0
    older: Path | None = None
    for number in range(rounds):
        if number:
            capture.start()
            same_parts.note(settings(capture))
        work = Workload(
            [capture.device(name) for name in capture.volumes], seed=seed + number, first_writer=10 * number,
            mark=lambda name: capture.request("mark", name=name),
        )  # fmt: skip
        work.start()
        for _ in range(rng.randint(0, 3)):
            work.wait_answered(work.answered + rng.randint(1, 150))
            capture.request("sync")
            if rng.random() < 0.3:
                capture.request("release", write=capture.status()["durable_write"])
        work.wait_answered(work.answered + rng.randint(0, 60))
        pass_time(rng.random() * rng.choice([0.1, 2]))  # what is durable comes to the volumes half a second later
        capture.kill()
        work.finish()
        here = compared(capture, caplog)
        seen += sum(here)
        if older is not None and here and here[0] > 300:
            now = shutil.copyfile(capture.backing("data"), capture.root / "now")
            with refused(capture, "volume data of main .* is not what it was"):
                shutil.copyfile(older, capture.backing("data"))
            shutil.copyfile(now, capture.backing("data"))
            noticed += 1
        older = shutil.copyfile(capture.backing("data"), capture.root / "older")
    assert seen > 100 * rounds, "hardly anything was compared"
    assert noticed


@pytest.mark.parametrize("seed", [1, 2])
def test_no_kill_makes_the_right_disk_a_stale_one(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    kill_rounds(make_capture, caplog, 8, 100 * seed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(3, 7))
def test_no_kill_of_fifty_does(make_capture: MakeCapture, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    kill_rounds(make_capture, caplog, 50, 100 * seed)


@LARGE
def test_what_was_written_behind_the_mark_is_not_asked_for(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """It may be there, or not, or torn; a zero or discard behind it as well. What it leaves alone is."""
    monkeypatch.setattr(stale, "_LARGE", large)
    capture = begun(make_capture, {"data": 16 * MIB})
    with Direct(capture.device("data")) as volume:
        for block in range(8):
            volume.write(block * BLOCK, filled("a"))
        erase(volume.fd, ZERO, 8 * BLOCK, 2 * BLOCK, device=False)
        erase(volume.fd, DISCARD, 10 * BLOCK, 2 * BLOCK, device=False)
        capture.request("sync")
        marked = read_mark(capture.journal / "applied")
        volume.write(0, filled("b"))
        erase(volume.fd, ZERO, BLOCK, BLOCK, device=False)
        erase(volume.fd, DISCARD, 2 * BLOCK, BLOCK, device=False)
        volume.write(8 * BLOCK, filled("b"))
        os.fsync(volume.fd)
    capture.kill()
    assert read_mark(capture.journal / "applied") == marked, "slower than this test can be"
    assert compared(capture, caplog) == [8]
    for block in (0, 1, 2, 8):
        put(capture, block, os.urandom(BLOCK))
    assert compared(capture, caplog) == [8]
    for block, was in ((3, filled("a")), (9, bytes(BLOCK)), (11, bytes(BLOCK))):
        with refused(capture, r": 1 of 8 blocks that were compared do not hold what the journal has"):
            put(capture, block, was[:-1] + b"x")
        put(capture, block, was)
    capture.start()


@LARGE
def test_an_older_write_of_the_same_block_is_not_what_counts(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """In one batch, in one segment, in several; nor what a zero or discard has taken away since."""
    monkeypatch.setattr(stale, "_LARGE", large)
    capture = begun(make_capture, {"data": 64 * MIB})
    with Direct(capture.device("data")) as volume:
        volume.write(0, filled("a") * 4)
        for number in range(40):  # of segments of 8 MiB
            volume.write(MIB, os.urandom(BLOCK) * 256)
            if number == 20:
                erase(volume.fd, ZERO, BLOCK, BLOCK, device=False)
                volume.write(2 * BLOCK, filled("c"))
        erase(volume.fd, DISCARD, 3 * BLOCK, BLOCK, device=False)
        capture.request("sync")
    capture.kill()
    assert len(list(capture.journal.glob("*.seg"))) > 3
    assert compared(capture, caplog) == [4 + 256]
    with refused(capture, "1 of 260 blocks"):
        put(capture, 1, filled("a"))
    put(capture, 1, bytes(BLOCK))
    (holds,) = [each for each in capture.journal.glob("*.seg") if filled("c") in each.read_bytes()]
    raw = holds.read_bytes()
    holds.write_bytes(raw.replace(filled("c"), filled("x")))
    assert compared(capture, caplog) == [1 + 256], "not what is older than a segment that is damaged"
    holds.write_bytes(raw)
    (capture.journal / "0000000000000001.seg").unlink()
    assert compared(capture, caplog) == [3 + 256], "of the segments that are there"
    with refused(capture, "1 of 259 blocks"):
        put(capture, 2, filled("a"))


def test_a_batch_that_does_not_fit_into_the_window(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets a larger one, while nothing of the batch before may be held any more."""
    capture = begun(make_capture, {"data": 16 * MIB})
    with Direct(capture.device("data")) as volume:
        for at, blocks in ((0, 1), (8, 2), (16, 64), (128, 256), (512, 3)):
            volume.write(at * BLOCK, filled("a") * blocks)
        for number in range(40):  # so that the mark is in the next segment
            volume.write((1024 + 64 * number) * BLOCK, filled("b") * 64)
        capture.request("sync")
    capture.kill()
    monkeypatch.setattr(segment, "CHUNK_BYTES", 16 * BLOCK)
    assert compared(capture, caplog) == [1 + 2 + 64 + 256 + 3 + 40 * 64]


def test_copies_of_two_volumes_in_each_others_place(make_capture: MakeCapture) -> None:
    """Each as it is now, so that nothing but its content tells; both are named."""
    capture = begun(make_capture, {"data": 16 * MIB, "wal": 16 * MIB})
    for name in capture.volumes:
        with Direct(capture.device(name)) as volume:
            volume.write(0, filled(name[0]) * 9)
    capture.request("sync")
    capture.kill()
    with refused(capture, "volume data .* 9 of 9 blocks .* volume wal .* 9 of 9 blocks"):
        aside = capture.backing("data").rename(capture.root / "aside")
        capture.backing("wal").rename(capture.backing("data"))
        aside.rename(capture.backing("wal"))


def test_a_damaged_journal_is_not_taken_for_a_stale_disk(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be read may have overwritten what can: of the damage behind the mark, the engine tells."""
    capture = begun(make_capture, {"data": 16 * MIB})
    with Direct(capture.device("data")) as volume:
        for letter in "abcd":
            volume.write(0, filled(letter))
            if letter != "d":
                capture.request("sync")
    capture.kill()
    first = capture.journal / "0000000000000001.seg"
    raw = first.read_bytes()
    for letter, count in (("d", 1), ("c", 0), ("b", 0)):
        first.write_bytes(raw.replace(filled(letter), filled("x")))
        put(capture, 0, filled("c"))
        if letter == "d":  # the very last batch: as torn
            with refused(capture, "1 of 1 blocks"):
                put(capture, 0, filled("e"))
        else:
            assert sum(compared(capture, caplog)) == count
    first.write_bytes(raw)


def test_volumes_that_were_taken_as_they_are(make_capture: MakeCapture, caplog: pytest.LogCaptureFixture) -> None:
    """What was on them then need not be in the journal; what is written behind that is asked for."""
    capture = begun(make_capture, {"data": 16 * MIB})
    with Direct(capture.device("data")) as volume:
        volume.write(0, filled("a") * 9)
    assert capture.stop() == 0
    put(capture, 0, filled("x"))
    assert compared(capture, caplog) == [], "stopped in order, the fingerprint tells"
    same_parts.forget(settings(capture).paths)
    capture.start()
    same_parts.note(settings(capture))
    with Direct(capture.device("data")) as volume:
        volume.write(BLOCK, filled("b"))
        capture.request("sync")
    capture.kill()
    assert compared(capture, caplog) == [1]
    with refused(capture, "1 of 1 blocks"):
        put(capture, 1, filled("a"))
    extending = settings(capture).paths.extend_state
    extending.touch()
    assert compared(capture, caplog) == [], "a new volume may have the number of another"
    extending.unlink()
    same_parts.forget(settings(capture).paths)
    assert compared(capture, caplog) == []


def test_a_larger_volume_or_one_less_is_left_to_the_engine(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes to a volume that was given up; and a disk that ends early, or is not there."""
    capture = begun(make_capture, {"data": 16 * MIB, "wal": 16 * MIB})
    for name in capture.volumes:
        with Direct(capture.device(name)) as volume:
            volume.write(0, filled("a"))
            volume.write(12 * MIB, filled("b"))
    capture.request("sync")
    capture.kill()
    sizes, capture.volumes = capture.volumes, {"data": 8 * MIB}
    assert compared(capture, caplog) == [1]
    capture.volumes = sizes
    os.truncate(capture.backing("data"), 8 * MIB)
    assert compared(capture, caplog) == [1, 2]
    capture.backing("data").unlink()
    assert compared(capture, caplog) == [0, 2]


def test_blocks_tracked_past_the_journal_are_not_asked_for(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed while changes are tracked, while the set heals, and behind that; the bitmap is read as it is written."""
    capture = begun(make_capture, {"data": 32 * MIB, "wal": 8 * MIB}, **SMALL)
    keeper = Keeper(capture)
    seen = 0
    for seed in range(1, 4):
        with load(capture, seed) as work:
            fill(capture, work)
            capture.kill()
        found = read_tracked(capture.journal / tracked.NAME)
        marked = tracked.marked_blocks(journal_of(capture))
        assert marked is not None
        assert [set(each.nonzero()[0].tolist()) for each in marked] == found.blocks
        seen += sum(compared(capture, caplog))
        for block in sorted(found.blocks[0])[:32]:
            put(capture, block, os.urandom(BLOCK))
        compared(capture, caplog)
        capture.start()
        with load(capture, 10 + seed, pause=0.01):
            wait_until(lambda: healing(capture, keeper), timeout=60, what="healing")
            capture.kill()
        seen += sum(compared(capture, caplog))
        capture.start()
        heal(capture, keeper)
        assert state(capture) == "capturing"
        capture.kill()
        assert tracked.marked_blocks(journal_of(capture)) == []
        seen += sum(compared(capture, caplog))
        capture.start()
    assert seen > 1000


def test_production_waits_no_longer_than_it_may(
    make_capture: MakeCapture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest blocks are compared; nothing is where what lies behind the mark takes too long to read."""
    capture = begun(make_capture, {"data": 64 * MIB})
    with Direct(capture.device("data")) as volume:
        for number in range(48):
            volume.write(number * MIB, os.urandom(BLOCK) * 256)
        capture.request("sync")
        volume.write(50 * MIB, filled("b"))
    capture.kill()
    monkeypatch.setattr(stale, "BLOCKS", 1000)
    assert compared(capture, caplog) == [1000]
    put(capture, 0, filled("x"))
    assert compared(capture, caplog) == [1000], "the newest ones"
    with refused(capture, "1 of 1000"):
        put(capture, 47 * 256, filled("x"))
    monkeypatch.setattr(stale, "SECONDS_BEHIND", -1.0)
    stale.refuse_stale(settings(capture))
    monkeypatch.setattr(stale, "SECONDS_BEHIND", 60.0)
    with pytest.raises(PreconditionError, match="1 of 1000"):
        stale.refuse_stale(settings(capture))
