"""The store as a whole: image, bundles and scrub; one flipped byte anywhere is found and never served."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from pgcdp.errors import BugError, DamageError, PreconditionError, TargetError
from pgcdp.postgres import timelines
from pgcdp.records import BLOCK, INDEX, Volume
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog
from pgcdp.store.image import Image
from pgcdp.store.layout import TIMELINES, Store
from pgcdp.store.open_interval import OpenInterval
from pgcdp.store.open_views import open_views, registered
from pgcdp.store.scrub import check_store
from tests.small_store import BLOCKS, SET_ID, PlainRun, boundary, flip, make_store


def test_store_json_comes_back(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    again = Store.open(store.path, SET_ID)
    assert again == store
    assert again.extra == {"made": "today"}
    assert again.baseline == boundary(0)
    with pytest.raises(PreconditionError, match="not of"):
        Store.open(store.path, bytes(16))
    with pytest.raises(PreconditionError, match=r"no store\.json"):
        Store.open(tmp_path)
    with pytest.raises(PreconditionError, match="not an empty directory"):
        Store.create(store.path, "s", SET_ID, [])
    with store.lock(), pytest.raises(PreconditionError, match="the agent of set s"):
        store.lock()


def test_a_sound_store_has_no_damage(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    seen: list[tuple[int, int]] = []
    report = check_store(store, progress=lambda done, total: seen.append((done, total)))
    assert report.ok, report.damages
    assert report.bytes_read > 100000
    assert seen[-1][0] <= seen[-1][1]
    assert check_store(store, full=False).ok


def test_one_flipped_byte_in_any_file_is_found_and_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    catalog = Catalog.open(store)
    catalog.remember("event", 5, {"what": "x"})
    catalog.close()
    chooser = random.Random(11)
    files = [path for path in sorted(store.path.rglob("*")) if path.is_file() and path.name != "lock"]
    assert len(files) == 2 + 2 + 2 + 2 + 3 * 7 + 1
    for path in files:
        size = path.stat().st_size
        whole = path.name in ("settings.json", "manifest.json", "state.json", "state-copy.json")
        for at in [0, size - 1, *(chooser.randrange(size) for _ in range(12))]:
            raw = flip(path, at, 6 if whole else chooser.randrange(8))
            if "incoming" in path.parts:
                with pytest.raises(DamageError, match=rf"{path}.* offset \d+"):
                    OpenInterval.open(store, 4, 31, durable_write=35)
                path.write_bytes(raw)
                continue
            report = check_store(store)
            if path.suffix == ".json" and path.name != "settings.json" and raw[at : at + 1].isspace():
                path.write_bytes(raw)
                continue
            assert not report.ok, (path, at)
            named = {damage.file for damage in report.damages}
            sums = path.with_suffix(".img") if path.suffix == ".sums" else path
            beside = {path.parent / name for name in ("manifest.json", "writes")}
            assert named & {sums, *beside}, (path, at, report.damages)
            assert all(damage.still and str(damage.file) in damage.message for damage in report.damages)
            path.write_bytes(raw)
    assert check_store(store).ok


def test_damaged_timelines_are_named(tmp_path: Path) -> None:
    store, pg_wal = make_store(tmp_path), tmp_path / "pg_wal"
    pg_wal.mkdir()
    place = store.path / TIMELINES
    history = "1\t0/3000000\tno recovery target specified\n"
    for name, text in (("00000002", history), ("00000003", f"{history}2\t0/4000000\tbefore 2026\n")):
        (pg_wal / f"{name}.history").write_text(text)
    timelines.keep(pg_wal, place, archives=True)
    report = check_store(store)
    assert (report.ok, report.timelines) == (True, 2)
    broken = [(timelines.NOTED, "{"), ("00000003.history", ""), ("00000003.history", history.replace("1", "9", 1))]
    for name, text in broken:
        raw = (place / name).read_bytes()
        (place / name).write_text(text)
        (damage,) = check_store(store, full=False).damages
        assert damage.file == place / name
        assert damage.still.startswith("every boundary and write can still be restored")
        (place / name).write_bytes(raw)
    assert check_store(store).ok


def test_damaged_image_block_is_named_and_never_served(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    image = Image.open(store)
    for name, at in (("data.img", 5 * BLOCK + 17), ("data.sums", 5 * 8 + 3)):
        raw = flip(store.image / name, at)
        with pytest.raises(DamageError, match=rf"data.img has a damaged block 5 at offset {5 * BLOCK}"):
            image.read_blocks(0, 3, 5)
        with pytest.raises(DamageError, match="damaged block 5"):
            list(image.contents(0, 0, BLOCKS))
        assert len(image.read_blocks(0, 0, 5)) == 5 * BLOCK
        (store.image / name).write_bytes(raw)
    raw = flip(store.image / "data.img", (BLOCKS - 1) * BLOCK)
    report = check_store(store)
    assert [damage.offset for damage in report.damages] == [(BLOCKS - 1) * BLOCK]
    assert "no interval changed it" in report.damages[0].still
    (store.image / "data.img").write_bytes(raw)
    changed = int(Bundle.open(store, 3).backward_map()["block"][0])
    flip(store.image / "data.img", changed * BLOCK)
    assert "boundary 2 and everything before it can still be restored" in check_store(store).damages[0].still
    image.close()


def test_a_lost_block_in_a_hole_is_found(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", 4096 * BLOCK)])
    image = Image.create(store, 1)
    image.write_blocks(0, 3000, b"x" * BLOCK)
    image.sync()
    os.truncate(store.image / "data.img", 0)
    os.truncate(store.image / "data.img", 4096 * BLOCK)
    with pytest.raises(DamageError, match="hole where block 3000 must be"):
        list(image.contents(0, 0, 4096))
    image.close()


def test_a_flipped_frame_says_what_is_left(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    bundle = Bundle.open(store, 2)
    flip(bundle.path / "writes", 200)
    (damage,) = check_store(store).damages
    assert (damage.file, damage.offset) == (bundle.path / "writes", 64)
    assert damage.still == "every boundary can still be restored, single writes of interval 2 cannot"
    with (
        pytest.raises(DamageError, match="writes has a damaged frame at offset 64"),
        Bundle.open(store, 2).writes() as r,
    ):
        r.read(0, 10)
    flip(bundle.path / "writes", 200)
    flip(bundle.path / "backward", 200)
    (damage,) = check_store(store).damages
    assert damage.still == "boundary 2 and everything behind it can still be restored"


def test_missing_and_cut_files_are_damage(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = store.interval(2) / "forward.map"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    with pytest.raises(DamageError, match=f"ends at offset {len(raw) - 1} instead of {len(raw)}"):
        Bundle.open(store, 2).forward_map()
    path.unlink()
    with pytest.raises(DamageError, match="is missing"):
        Bundle.open(store, 2).forward_map()
    assert len(Bundle.open(store, 2).index()) == 10, "who needs another file is not refused"
    path.write_bytes(raw)
    (store.interval(2) / "manifest.json").unlink()
    with pytest.raises(DamageError, match=r"manifest.json is missing"):
        Bundle.open(store, 2)
    shutil.rmtree(store.interval(2))
    with pytest.raises(TargetError, match="has no interval 2"):
        Bundle.open(store, 2)
    assert any("does not follow interval 1" in damage.message for damage in check_store(store).damages)


def test_a_bundle_of_another_interval_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for name in ("writes", "index", "backward", "backward.map", "forward.map"):
        mine, other = store.interval(1) / name, store.interval(2) / name
        raw = mine.read_bytes()
        mine.write_bytes(other.read_bytes())
        assert not check_store(store).ok
        mine.write_bytes(raw)
    shutil.rmtree(store.interval(1))
    shutil.copytree(store.interval(2), store.interval(1))
    with pytest.raises(DamageError, match="is not that of interval 1"):
        Bundle.open(store, 1)


def test_writes_whose_sync_may_have_failed_are_taken_from_the_journal_again(tmp_path: Path) -> None:
    """A failed sync is told once: the next one says yes to pages that the disk never got."""
    store = make_store(tmp_path, 1)
    opened = OpenInterval.open(store, 2, 11, durable_write=15)
    opened.append(PlainRun(16, random.Random(1), 20))
    opened.sync()  # let this be the one that failed: nobody was told of write 35
    opened.close()
    again = OpenInterval.open(store, 2, 11, durable_write=15)
    assert again.last_write == 15
    again.append(PlainRun(16, random.Random(1), 20))
    assert again.sync() == 35
    again.set_boundary(boundary(2)._replace(write=35))
    again.finish()
    again.close()
    done = OpenInterval.open(store, 2, 11, durable_write=15)
    assert done.last_write == 35
    sizes = [(store.incoming(2) / name).stat().st_size for name in ("writes", "index")]
    done.finish()
    assert [(store.incoming(2) / name).stat().st_size for name in ("writes", "index")] > sizes
    done.close()


def test_a_killed_create_can_be_done_again(tmp_path: Path) -> None:
    for name in ("image", "incoming"):
        (tmp_path / "store" / name).mkdir(parents=True)
    Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)])
    assert Store.open(tmp_path / "store").set_name == "s"
    (tmp_path / "other" / "image" / "data.img").mkdir(parents=True)
    with pytest.raises(PreconditionError, match="not an empty directory"):
        Store.create(tmp_path / "other", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)])


def test_open_interval_refuses_a_gap(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    opened = OpenInterval.open(store, 2, 11, durable_write=15)
    assert opened.last_write == 15
    with pytest.raises(BugError, match="cannot take 17"):
        opened.append(PlainRun(17, random.Random(1), 1))
    opened.append(PlainRun(16, random.Random(1), 1))
    assert opened.index()["number"].tolist() == list(range(11, 17))
    assert opened.index().dtype == INDEX
    opened.close()


def test_a_view_that_cannot_be_told_stops_the_image_and_says_which_file(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with registered(store, tmp_path / "control", 7) as known:
        assert [view.write for view in open_views(store)] == [7]
        assert known.file is not None
        for content in (b"", b"starting\n", b'{"write": 7}', b"[]", b"\xff"):
            known.file.write_bytes(content)
            with pytest.raises(DamageError, match=f"{known.file.name} does not tell"):
                open_views(store)
    assert open_views(store) == []
    assert not known.file.exists()


def test_an_agent_that_meets_damage_again_and_again_keeps_no_files_open(tmp_path: Path) -> None:
    """It tries once a second, for as long as nobody mends it."""
    store = make_store(tmp_path)
    opened = OpenInterval.open(store, 4, 31)
    opened.append(PlainRun(31, random.Random(5), 10))
    opened.sync()
    opened.close()
    before = len(os.listdir("/proc/self/fd"))
    for name in ("index", "writes"):
        whole = flip(store.incoming(4) / name, 70)
        for _ in range(3):
            with pytest.raises(DamageError):
                OpenInterval.open(store, 4, 31, durable_write=40)
        (store.incoming(4) / name).write_bytes(whole)
    with pytest.raises(DamageError, match="does not begin with write 32"):
        OpenInterval.open(store, 4, 32, durable_write=40)
    assert len(os.listdir("/proc/self/fd")) == before
    OpenInterval.open(store, 4, 31, durable_write=40).close()
