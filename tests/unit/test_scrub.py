"""A scrub: at its rate, from where it was killed, in nobody's way; and what it found is kept until it is mended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp import scrubbing
from pgcdp.errors import DamageError
from pgcdp.looking import info
from pgcdp.records import Span, Target
from pgcdp.store.history import history_names
from pgcdp.store.image_lock import image_to_move
from pgcdp.store.layout import Store
from pgcdp.store.notes import notes_of
from pgcdp.store.scrub import Checker
from pgcdp.store.scrub_record import FILE_NAME, Record, read_record
from pgcdp.store.scrubbing import Pace, Stopped, is_wanted, scrub
from pgcdp.store.thinning import thin
from tests.unit.test_blockmap import Scene
from tests.waiting import wait_until


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, 19, [9, 14, 7, 11], 8, 0)


@pytest.fixture
def store(scene: Scene) -> Store:
    return scene.world.store


def flip(file: Path, at: int) -> bytes:
    whole = file.read_bytes()
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    return whole


class StopsAfter(Pace):
    """Told to stop when so many bytes were read."""

    def __init__(self, limit: int) -> None:
        super().__init__(0)
        self.limit = limit
        self.read = 0

    def __call__(self, size: int) -> None:
        self.read += size
        if self.read > self.limit:
            raise Stopped


def test_it_goes_on_where_it_was_stopped(store: Store) -> None:
    whole = StopsAfter(1 << 40)
    scrub(store, "check", whole)
    stops, total, interval = 0, 0, 0
    while True:
        pace = StopsAfter(whole.read * 3 // 4)
        try:
            done = scrub(store, "check", pace)
            break
        except Stopped:
            record = read_record(store)
            assert record.under_way
            assert record.interval > interval
            interval = record.interval
            stops += 1
            assert stops < 20
        finally:
            total += pace.read
    assert stops >= 1
    assert done.gone_on is not None
    assert done.record.ended >= done.record.began
    assert not read_record(store).under_way
    assert total < 1.7 * whole.read, "what was read already is not read again and again"


def test_a_killed_check_goes_on_and_says_where(store: Store) -> None:
    words = [sys.executable, "-m", "pgcdp", "check", "--store", str(store.path), "--full", "--output", "json", "--rate"]
    child = subprocess.Popen([*words, "20K"], stdout=subprocess.DEVNULL)
    wait_until(lambda: read_record(store).interval >= 2, timeout=60, what="two intervals were read")
    child.send_signal(signal.SIGKILL)
    child.wait()
    record = read_record(store)
    assert record.under_way
    done = subprocess.run([*words, "0"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done
    (said,) = [each["detail"] for each in json.loads(done.stdout)["checks"] if each["name"] == "store"]
    where = f"at block {record.block} of the image" if record.block else f"behind interval {record.interval}"
    assert f"gone on {where} where a check was killed: its oldest part was read" in said
    done = subprocess.run([*words, "0"], check=False, capture_output=True, text=True)
    assert "gone on" not in done.stdout


def test_a_check_of_a_store_alone_writes_nothing_into_it(store: Store) -> None:
    before = {path: path.lstat().st_mtime_ns for path in store.path.rglob("*")}
    assert [each.ok for each in scrubbing.check(store, True, 0, lambda now: None, remember=False)] == [True] * 3
    assert {path: path.lstat().st_mtime_ns for path in store.path.rglob("*")} == before


def test_it_keeps_to_its_rate(store: Store) -> None:
    whole = StopsAfter(1 << 40)
    scrub(store, "check", whole)
    begun = time.monotonic()
    scrub(store, "check", Pace(whole.read))
    assert time.monotonic() - begun > 0.9, "all of it in a second"


def test_no_file_is_read_faster_than_that(store: Store) -> None:
    """A file of single writes may be a gigabyte: its frames are paced, not the file."""
    told: list[int] = []
    checker = Checker(store)
    checker.count = told.append
    checker.interval(Span(2, 2))
    frames = sum(
        (store.interval(2) / name).stat().st_size > 0
        for name in ("writes", "index", "backward", "backward.map", "forward.map")
    )
    assert len(told) >= frames
    assert sum(told) >= 0.9 * (store.interval(2) / "writes").stat().st_size


def test_what_was_found_is_kept_until_it_is_mended(store: Store, scene: Scene) -> None:
    ends = [0, *(each.to_write for each in scene.source().intervals())]
    file = store.interval(2) / "backward"
    whole = flip(file, 200)
    found = scrub(store, "agent", Pace(0)).record.damages
    assert [(each.file, each.lost) for each in found] == [(file, (0, ends[2] - 1))]
    told = info(None, store.path)
    assert [each["file"] for each in told["damages"]] == [str(file)]
    assert told["lost"] == [{"from_write": 0, "to_write": ends[2] - 1}]
    assert [each["restorable_by_write"] for each in told["intervals"]] == [False, False, True, True]
    (said,) = [each for each in scrubbing.known(store, 60.0) if not each.ok]
    assert str(file) in said.detail
    assert scrubbing.status_json(store)["damages"] == 1
    file.write_bytes(whole)
    assert info(None, store.path)["lost"], "nobody has read it again"
    with pytest.raises(Stopped):
        scrub(store, "agent", StopsAfter(10))
    assert read_record(store).damages, "nor has this one"
    assert not scrub(store, "agent", Pace(0)).record.damages
    assert info(None, store.path)["lost"] == []


def test_a_point_that_needs_a_lost_one_names_the_nearest_that_no_scrub_found_wrong(store: Store, scene: Scene) -> None:
    ends = [0, *(each.to_write for each in scene.source().intervals())]
    flip(store.interval(4) / "index", 200)
    scrub(store, "check", Pace(0))
    (store.interval(3) / "manifest.json").unlink()
    with pytest.raises(DamageError) as caught:
        scene.source().resolve(Target("write", ends[2]))
    assert "--target-boundary 3 " in str(caught.value.hint)
    assert "before it" not in str(caught.value.hint)
    with pytest.raises(DamageError) as caught:
        scene.source().resolve(Target("write", ends[3] + 2))
    assert "--target-boundary 3 " in str(caught.value.hint)
    assert "--target-boundary 4 " in str(caught.value.hint)


def test_nobody_is_kept_waiting(store: Store) -> None:
    """The image can be moved and a view opened at each moment at which it waits for its rate."""
    looks = 0

    class Looks(Pace):
        def __call__(self, size: int) -> None:
            nonlocal looks
            looks += 1
            with image_to_move(store) as let_readers_in:
                assert let_readers_in is not None, "the image is held while it waits"

    scrub(store, "agent", Looks(0))
    assert looks > 20


def test_what_retention_changes_meanwhile_is_no_damage(store: Store) -> None:
    done: list[int] = []
    count = 0

    class Thins(Pace):
        def __call__(self, size: int) -> None:
            nonlocal count
            count += 1
            if count % 9 == 0 and len(done) < 3:
                done.append(len(done) + 1)
                thin(store, Span(done[-1], done[-1]))
                (store.interval(done[-1]) / "writes").unlink()

    store.aside.mkdir()
    assert scrub(store, "agent", Thins(0)).record.damages == ()
    assert done == [1, 2, 3]


def test_the_agent_makes_way_for_a_check(store: Store) -> None:
    read = threading.Event()
    ended: list[str] = []

    class Slow(Pace):
        def __call__(self, size: int) -> None:
            read.set()
            super().__call__(size)

    def agent() -> None:
        try:
            scrub(store, "agent", Slow(2000, lambda: is_wanted(store)))
        except Stopped:
            ended.append("made way")

    thread = threading.Thread(target=agent)
    thread.start()
    assert read.wait(30)
    done = scrub(store, "check", Pace(0))
    thread.join(30)
    assert ended == ["made way"]
    assert done.gone_on is None, "who asks for a check wants all of it read now"
    assert not is_wanted(store)
    assert not read_record(store).under_way


def test_when_it_is_due() -> None:
    never, begun, now = Record(), 10**18 - 60 * 10**9, 10**18
    assert scrubbing.is_due(never, 60.0, now, begun)
    assert not scrubbing.is_due(never, 60.0, now, begun + 1), "nothing in it is that old"
    assert not scrubbing.is_due(never, None, now, begun)
    read = replace(never, began=now, ended=now + 5, whole=now)
    assert not scrubbing.is_due(read, 60.0, now + 59 * 10**9, begun)
    assert scrubbing.is_due(read, 60.0, now + 60 * 10**9, begun)
    assert scrubbing.is_due(replace(read, began=read.ended + 1), 60.0, now + 10**9, begun), "one is under way"
    assert scrubbing.is_due(read, 60.0, 10**17, 0), "a clock that went back"


def test_its_outcome_is_an_event(store: Store) -> None:
    before = history_names(store)
    list(scrubbing.check(store, True, 0, lambda now: None, remember=True))
    (name,) = set(history_names(store)) - set(before)
    assert json.loads((store.history / name).read_text())["content"]["event"] == "scrub"


def test_a_record_that_cannot_be_read_is_made_anew(store: Store) -> None:
    scrub(store, "check", Pace(0))
    file = notes_of(store) / FILE_NAME
    for content in (b"", b"{}", file.read_bytes()[:-9], b'{"began": 7}'):
        file.write_bytes(content)
        assert read_record(store) == Record()
    os.unlink(file)
    assert read_record(store) == Record()
