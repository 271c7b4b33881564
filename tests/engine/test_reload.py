"""A view gets another map while it is read: what was written stays, and the old map is over when the engine says so."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pgcdp.capture.control import EngineBusy
from pgcdp.errors import DamageError, PgcdpError, UsageError
from pgcdp.records import BLOCK, EXTENT_DATA, EXTENT_ZEROS, MAP_EXTENT, Volume
from pgcdp.recovery.mapfile import FramesSource, ImageSource, MapSource, ViewMap, encode
from pgcdp.store.frames import FrameWriter
from pgcdp.store.image_files import block_sums
from tests.fix_engine import Direct
from tests.fix_views import ShowMap, ShownView, waits_for_fuse
from tests.stopping import stop
from tests.unit.test_increments import SET_ID
from tests.waiting import wait_until

BLOCKS = 256


def image_at(place: Path, content: bytes) -> None:
    """PLACE.img and PLACE.sums."""
    place.with_suffix(".img").write_bytes(content)
    place.with_suffix(".sums").write_bytes(block_sums(content).tobytes())


def frames_at(path: Path, content: bytes) -> FramesSource:
    writer = FrameWriter.create(path, b"PTCH", SET_ID, 0)
    writer.append(content)
    writer.finish()
    return FramesSource(path, b"PTCH", 0)


def map_of(image: Path, *rows: tuple[int, int, FramesSource | None], blocks: int = BLOCKS) -> ViewMap:
    """One volume; `rows` are (first block, blocks, a frames file from its beginning on, or None for zeros)."""
    sources: list[MapSource] = [ImageSource(image), *(source for *_, source in rows if source is not None)]
    extents = [
        (block, count, 0, EXTENT_ZEROS if source is None else EXTENT_DATA, 0, sources.index(source) if source else 0, 0)
        for block, count, source in rows
    ]
    volumes = (Volume(0, "data", blocks * BLOCK),)
    return ViewMap(SET_ID, volumes, (0,), tuple(sources), np.array(extents, dtype=MAP_EXTENT))


def reload(view: ShownView, view_map: ViewMap | bytes) -> None:
    path = view.root / "next"
    path.write_bytes(view_map if isinstance(view_map, bytes) else encode(view_map))
    view.client.request("reload", map=str(path))


def read(view: ShownView, block: int = 0, count: int = BLOCKS) -> bytes:
    with Direct(view.device("data")) as volume:
        return volume.read(block * BLOCK, count * BLOCK)


def test_what_was_written_stays_on_top_of_every_map(show_map: ShowMap, scratch: Path) -> None:
    chooser = random.Random(1)
    below, first, second = (chooser.randbytes(BLOCKS * BLOCK) for _ in range(3))
    image_at(scratch / "data", below)
    view = show_map(map_of(scratch / "data", (10, 20, frames_at(scratch / "first", first))))
    model = bytearray(below)
    model[10 * BLOCK : 30 * BLOCK] = first[: 20 * BLOCK]
    assert read(view) == bytes(model)
    with Direct(view.device("data")) as volume:
        volume.write(15 * BLOCK, b"x" * (30 * BLOCK))
    reload(view, map_of(scratch / "data", (5, 15, frames_at(scratch / "second", second)), (100, 50, None)))
    model = bytearray(below)
    model[5 * BLOCK : 20 * BLOCK] = second[: 15 * BLOCK]
    model[100 * BLOCK : 150 * BLOCK] = bytes(50 * BLOCK)
    model[15 * BLOCK : 45 * BLOCK] = b"x" * (30 * BLOCK)
    assert read(view) == bytes(model)
    assert view.status()["reloads"] == 1
    assert view.stop() == 0


def open_files(pid: int) -> list[str]:
    """What the process has open; a connection may be closed while it is listed."""
    names = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(fd))
    return names


def test_frames_of_a_file_that_is_gone_are_not_taken_for_those_of_another(show_map: ShowMap, scratch: Path) -> None:
    """Each map names another file of the same shape; what was unpacked of the one before is still in the cache."""
    image_at(scratch / "data", bytes(BLOCKS * BLOCK))
    contents = [random.Random(seed).randbytes(BLOCKS * BLOCK) for seed in range(4)]
    maps = [map_of(scratch / "data", (0, BLOCKS, frames_at(scratch / f"f{n}", c))) for n, c in enumerate(contents)]
    view = show_map(maps[0])
    chooser = random.Random(2)
    for number in [*(chooser.randrange(4) for _ in range(60)), 2]:
        reload(view, maps[number])
        assert read(view) == contents[number], f"map {number}"
    before = view.status()["cache"]["misses"]
    both = map_of(scratch / "data", (0, BLOCKS, maps[2].sources[1]))  # type: ignore[arg-type]
    reload(view, both)
    assert read(view) == contents[2]
    assert view.status()["cache"]["misses"] == before, "a file that both maps name stays open, its frames stay unpacked"
    files = open_files(view.status()["pid"])
    assert len(files) < 30
    assert [name for name in files if name.startswith(str(scratch / "f"))] == [str(scratch / "f2")]
    assert view.stop() == 0


def refusals(good: ViewMap) -> dict[str, bytes]:
    """By what must be said of each."""
    raw = encode(good)
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1
    overlapping = np.concatenate([good.extents, good.extents])
    (volume,) = good.volumes
    other_image = (ImageSource(Path("/another/data")), *good.sources[1:])
    return {
        "a wrong header or checksum": bytes(flipped),
        "wrong header or checksum": raw[:-1],
        "its end": b"",
        "overlaps": encode(replace(good, extents=overlapping)),
        "other volumes than the map that is shown": encode(replace(good, set_id=bytes(16))),
        "other volumes": encode(replace(good, volumes=(replace(volume, name="other"),))),
        "volumes than the map": encode(replace(good, volumes=(replace(volume, bytes=2 * volume.bytes),))),
        "than the map that is shown": encode(replace(good, sources=other_image)),
        "map that is shown": encode(
            replace(good, volumes=(volume, replace(volume, number=1, name="more")), images=(0, 0))
        ),
    }


def test_a_bad_map_is_refused_and_the_old_one_goes_on(show_map: ShowMap, scratch: Path) -> None:
    content = random.Random(3).randbytes(BLOCKS * BLOCK)
    image_at(scratch / "data", bytes(BLOCKS * BLOCK))
    good = map_of(scratch / "data", (0, BLOCKS, frames_at(scratch / "frames", content)))
    view = show_map(good)
    for said, raw in refusals(good).items():
        with pytest.raises(DamageError, match=said) as raised:
            reload(view, raw)
        assert str(view.root / "next") in raised.value.message
        assert read(view) == content, said
    with pytest.raises(PgcdpError, match="cannot open the map /nowhere"):
        view.client.request("reload", map="/nowhere")
    with pytest.raises(UsageError, match="needs the path"):
        view.client.request("reload")
    status = view.status()
    assert (status["reloads"], status["error_count"]) == (0, 0), "nothing is wrong with what is shown"
    reload(view, good)
    assert view.stop() == 0


def test_a_map_made_from_one_that_is_no_longer_shown_is_refused(show_map: ShowMap, scratch: Path) -> None:
    """Of two who change the map at the same time, the second would take back what the first did."""
    image_at(scratch / "data", bytes(BLOCKS * BLOCK))
    contents = [bytes([n]) * BLOCKS * BLOCK for n in (1, 2)]
    view = show_map(map_of(scratch / "data"))
    first = view.status()["map"]
    assert first == str(view.map_file)
    paths = []
    for number, content in enumerate(contents):
        paths.append(view.root / f"map{number}")
        source = frames_at(scratch / f"f{number}", content)
        paths[number].write_bytes(encode(map_of(scratch / "data", (0, BLOCKS, source))))
    view.client.request("reload", map=str(paths[0]), before=first)
    with pytest.raises(EngineBusy, match=f"the map {paths[0]} is shown, not {first}"):
        view.client.request("reload", map=str(paths[1]), before=first)
    assert read(view) == contents[0]
    assert view.status()["map"] == str(paths[0])
    view.client.request("reload", map=str(paths[1]), before=str(paths[0]))
    assert read(view) == contents[1]
    assert view.stop() == 0


def test_a_map_is_acknowledged_only_when_the_last_read_by_the_old_one_is_done(show_map: ShowMap, scratch: Path) -> None:
    """The image lies in another view, which is stopped while it is read: that takes as long as the test wants."""
    old, new = b"o" * BLOCKS * BLOCK, b"n" * BLOCKS * BLOCK
    image_at(scratch / "below", old)
    below = show_map(map_of(scratch / "below"))
    (scratch / "data.img").symlink_to(below.device("data"))
    (scratch / "data.sums").symlink_to(scratch / "below.sums")
    view = show_map(map_of(scratch / "data"))
    pid, stopped = int(view.status()["pid"]), int(below.status()["pid"])
    answers: list[bytes] = []
    errors: list[Exception] = []
    reader = threading.Thread(target=lambda: answers.append(read(view, 7, 1)))

    def ask() -> None:
        try:
            reload(view, map_of(scratch / "data", (0, BLOCKS, frames_at(scratch / "new", new))))
        except Exception as error:
            errors.append(error)

    asker = threading.Thread(target=ask)
    stop(stopped)
    try:
        reader.start()
        wait_until(lambda: waits_for_fuse(pid), what="a read of the image under way")
        asker.start()
        # With a read that is stuck under the old map, one by the new map is served; only then is the outcome known.
        wait_until(lambda: served_new(view, new), what="the new map")
        assert view.status()["reloads"] == 0, "acknowledged while the image was still being read by the old map"
        assert asker.is_alive()
    finally:
        os.kill(stopped, signal.SIGCONT)
    asker.join(60)
    reader.join(60)
    assert errors == []
    assert answers == [old[:BLOCK]]
    assert view.status()["reloads"] == 1
    assert view.stop() == 0


def served_new(view: ShownView, new: bytes) -> bool:
    """Whether a read that does not need the image's reader is by the new map: its answer would not come otherwise."""
    answer: list[bytes] = []
    thread = threading.Thread(target=lambda: answer.append(read(view, 100, 1)), daemon=True)
    thread.start()
    thread.join(2)
    return answer == [new[:BLOCK]]
