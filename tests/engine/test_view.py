"""What a view promises: the bytes of its recovery point, writes that touch nothing else, bounded memory, an end."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pgcdp.records import BLOCK, RecoveryPoint
from tests.fix_engine import Direct
from tests.fix_views import ShowMap, ShownView
from tests.raw_workload import erase
from tests.unit.test_blockmap import Scene, materialized
from tests.unit.test_increments import BLOCKS
from tests.view_maps import FRAME, NAMES, big_map, content_at, shown_bytes
from tests.waiting import wait_until


def tree(place: Path) -> dict[str, str]:
    """Every file below a directory with the digest of its content."""
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("moving", [False, True], ids=["at rest", "moving"])
def test_a_view_equals_the_image_that_a_restore_makes(
    show_map: ShowMap, scratch: Path, seed: int, moving: bool
) -> None:
    """At boundaries, inside of intervals old and open, in the journal, with WAL blank from an LSN on."""
    scene = Scene(scratch / "scene", seed, [12, 20, 9], 14, 16)
    if moving:
        scene.leave_moving(4)
        scene.capture(15)
    newest = len(scene.world.ops)
    points = {0, newest, *(interval.to_write for interval in scene.source().intervals())}
    points |= {scene.chooser.randrange(newest + 1) for _ in range(5)}
    before = tree(scene.world.store.path) | {"image/lock": hashlib.sha256(b"").hexdigest()}
    for write in sorted(points):
        for point in [RecoveryPoint(write, None, 0), *scene.blank_points(write)]:
            source = scene.source()
            with source.held():
                wanted = materialized(source, point, scene.place)
            view = show_map(scene.mapped(point))
            assert shown_bytes(view, scene.chooser) == wanted, f"{point}"
            assert view.status()["error_count"] == 0
            assert view.stop() == 0
    assert tree(scene.world.store.path) == before


# --- writing


def test_what_is_written_is_read_again_and_touches_nothing_else(show_map: ShowMap, scratch: Path) -> None:
    scene = Scene(scratch / "scene", 21, [12, 12], 8, 8)
    write = 20
    before = tree(scratch / "scene")
    view = show_map(scene.mapped(RecoveryPoint(write, None, 0)))
    assert (scratch / "scene" / "patch").exists() == ("patch" in before)
    model = [bytearray(content) for content in scene.at(write)]
    other = show_map(scene.mapped(RecoveryPoint(write, None, 0)))
    for number in range(200):
        which = scene.chooser.randrange(2)
        begin = scene.chooser.randrange(BLOCKS)
        count = scene.chooser.randrange(1, min(BLOCKS - begin, 12) + 1)
        span = slice(begin * BLOCK, (begin + count) * BLOCK)
        with Direct(view.device(NAMES[which])) as volume:
            if number % 4 == 3:
                erase(volume.fd, scene.chooser.choice([2, 3]), span.start, span.stop - span.start, device=False)
                model[which][span] = bytes(span.stop - span.start)
            else:
                data = scene.chooser.randbytes(span.stop - span.start)
                volume.write(span.start, data)
                model[which][span] = data
            assert volume.read(span.start, span.stop - span.start) == bytes(model[which][span])
    assert shown_bytes(view, scene.chooser) == [bytes(volume) for volume in model]
    assert shown_bytes(other, scene.chooser) == scene.at(write), "another view of the same point"
    assert view.stop() == 0
    assert other.stop() == 0
    after = tree(scratch / "scene")
    assert {name: digest for name, digest in after.items() if name in before} == before


READER = """
import mmap, os, random, sys
device, below, size, pieces = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
old = open(below, "rb").read()
fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
own = random.Random(os.getpid())
with mmap.mmap(-1, 4096) as memory:
    print("ready", flush=True)
    seen = 0
    while seen < pieces:  # follow the writer: each piece is watched at its last block until that is the new one
        place = min((seen + 1) * size, len(old)) - 4096 * own.randrange(1, 3)
        os.preadv(fd, [memory], place)
        content = bytes(memory)
        if content == old[place:place + 4096]:
            continue
        if content != bytes(byte ^ 255 for byte in old[place:place + 4096]):
            sys.exit(f"offset {place}: {content[:16]!r}")
        seen += 1
"""


def test_blocks_are_whole_while_others_write(show_map: ShowMap, scratch: Path) -> None:
    """Of a block that is written for the first time one sees what was below or what was written, never a hole."""
    frames, piece = 128, 256 * BLOCK
    view = show_map(big_map(scratch, frames), "--cache=268435456")
    below = content_at(0, frames * FRAME)
    (scratch / "below").write_bytes(below)
    above = bytes(np.frombuffer(below, dtype=np.uint8) ^ 255)
    words = [sys.executable, "-c", READER, str(view.device("data")), str(scratch / "below")]
    words += [str(piece), str(len(below) // piece)]
    readers = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    with Direct(view.device("data")) as volume:
        for at in range(0, len(below), piece):
            volume.write(at, above[at : at + piece])
            assert volume.read(at, piece) == above[at : at + piece]
    for reader in readers:
        said = reader.communicate(timeout=60)[1]
        assert (reader.returncode, said) == (0, "")


# --- memory, modes, its end


def test_unpacked_frames_are_kept_within_their_bound(show_map: ShowMap, scratch: Path) -> None:
    frames, limit = 40, 4 << 20
    view = show_map(big_map(scratch, frames), f"--cache={limit}")
    chooser = random.Random(2)

    def reader(seed: int) -> None:
        own = random.Random(seed)
        with Direct(view.device("data")) as volume:
            for _ in range(150):
                at = own.randrange(frames * FRAME // BLOCK - 16) * BLOCK
                assert volume.read(at, 16 * BLOCK) == content_at(at, 16 * BLOCK)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = view.status()["cache"]
    assert cache["bytes"] <= limit
    assert cache["most_bytes"] <= limit, "there was always an unused one that could go"
    assert cache["hits"] > 0
    assert cache["misses"] > frames
    with Direct(view.device("data")) as volume:
        at = chooser.randrange(frames) * FRAME
        volume.read(at, BLOCK)
        before = view.status()["cache"]
        for _ in range(20):
            assert volume.read(at + 8 * BLOCK, BLOCK) == content_at(at + 8 * BLOCK, BLOCK)
        after = view.status()["cache"]
        assert (after["hits"] - before["hits"], after["misses"]) == (20, before["misses"])
        end = (1 << 30) - 3 * BLOCK
        assert volume.read(end, 3 * BLOCK) == content_at(frames * FRAME - BLOCK, BLOCK) + bytes(2 * BLOCK)
        assert volume.read((1 << 30) - 10050 * BLOCK, 256 * BLOCK) == bytes(256 * BLOCK)
    if "asan" not in str(view.program):
        assert view.status()["rss_kib"] < 40 * 1024
    assert view.stop() == 0


def test_status_modes_and_refusals(show_map: ShowMap, scratch: Path) -> None:
    view = show_map(big_map(scratch, 1))
    assert view.client.control.stat().st_mode & 0o777 == 0o600
    assert stat.S_IMODE((view.root / "data.cow").stat().st_mode) == 0o600
    assert (view.root / "data.cow").stat().st_blocks == 0
    with Direct(view.device("data")) as volume:
        with pytest.raises(Exception, match="1 files of the view are open"):
            view.client.request("stop")
        assert view.status()["volumes"] == [{"name": "data", "number": 0, "bytes": 1 << 30, "open": True}]
        with pytest.raises(OSError, match="Invalid"):
            os.pread(volume.fd, 100, 0)
        volume.write(BLOCK, bytes(BLOCK))
    with pytest.raises(Exception, match="unknown command"):
        view.client.request("cut")
    status = view.status()
    assert (status["writes"], status["bytes_written"], status["state"]) == (1, BLOCK, "showing")
    assert Path(f"/proc/{status['pid']}/oom_score_adj").read_text() == Path("/proc/self/oom_score_adj").read_text()
    assert "VmLck:\t       0 kB" in Path(f"/proc/{status['pid']}/status").read_text()
    assert view.stop() == 0
    assert not view.client.control.exists()
    for missing in ("--map", "--fuse", "--control", "--overlay"):
        words = [word for word in view.command() if not word.startswith(missing)]
        assert subprocess.run(words, capture_output=True, check=False).returncode == 2


def by_signal(view: ShownView) -> None:
    assert view.process is not None
    view.process.send_signal(signal.SIGTERM)


def by_eof(view: ShownView) -> None:
    assert view.process is not None
    assert view.process.stdin is not None
    view.process.stdin.close()


@pytest.mark.parametrize("end", [by_signal, by_eof])
@pytest.mark.parametrize("used", [False, True], ids=["idle", "open"])
def test_it_ends_at_once(show_map: ShowMap, scratch: Path, end: Callable[[ShownView], None], used: bool) -> None:
    view = show_map(big_map(scratch, 1), "--until-eof")
    fd = os.open(view.device("data"), os.O_RDWR | os.O_DIRECT) if used else -1
    if not used:
        wait_until(lambda: not view.status()["volumes"][0]["open"], what="a closed file")
    end(view)
    assert view.ended() == 0
    if used:
        with pytest.raises(OSError, match=r"not connected|Input/output|abort"):
            os.pread(fd, BLOCK, 0)
        with suppress(OSError):
            os.close(fd)
    assert not view.client.control.exists()
