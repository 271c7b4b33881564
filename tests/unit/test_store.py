"""The store as a whole: image, bundles, catalog and scrub; one flipped byte anywhere is found and never served."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from pgcdp.errors import BugError, DamageError, PreconditionError, TargetError
from pgcdp.intervals.increments import close_interval, move_image
from pgcdp.postgres import timelines
from pgcdp.records import BLOCK, INDEX, RECORD, Boundary, Interval, Volume
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog, catalog_file
from pgcdp.store.image import Image, ImageState, block_sums, read_state
from pgcdp.store.layout import TIMELINES, Store
from pgcdp.store.open_interval import OpenInterval
from pgcdp.store.open_views import open_views, registered
from pgcdp.store.published import published
from pgcdp.store.rebuild import rebuild
from pgcdp.store.scrub import check_store
from pgcdp.store.survey import survey

SET_ID = bytes(range(16))
BLOCKS = 64


class PlainRun:
    """Writes without a journal."""

    def __init__(self, first: int, chooser: random.Random, count: int) -> None:
        self.records = np.zeros(count, dtype=RECORD)
        self.records["kind"] = 1
        self.records["number"] = np.arange(first, first + count)
        self.records["wall_ns"] = 10**18 + self.records["number"].astype(np.int64)
        self.records["offset"] = [chooser.randrange(BLOCKS // 2) * BLOCK for _ in range(count)]
        self.records["length"] = self.records["data_length"] = BLOCK
        self.data = np.frombuffer(chooser.randbytes(count * BLOCK), dtype=np.uint8)
        self.data_offsets = np.arange(count) * BLOCK


def boundary(number: int) -> Boundary:
    return Boundary(number, number * 10, 10**18 + number * 10, 100, 90, 1, 700, "period")


def make_store(place: Path, intervals: int = 3) -> Store:
    store = Store.create(place / "store", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)], {"made": "today"})
    chooser = random.Random(3)
    image = Image.create(store, 1)
    image.write_blocks(0, 0, chooser.randbytes(BLOCKS // 2 * BLOCK))
    image.set_at(0, 0)
    store = store.with_baseline(boundary(0))
    for number in range(1, intervals + 1):
        opened = OpenInterval.open(store, number, number * 10 - 9)
        opened.append(PlainRun(number * 10 - 9, chooser, 10))
        move_image(image, close_interval(store, opened, image, boundary(number), {"port": "5432"}))
    image.close()
    opened = OpenInterval.open(store, intervals + 1, intervals * 10 + 1)
    opened.append(PlainRun(intervals * 10 + 1, chooser, 5))
    opened.sync()
    opened.close()
    return store


def flip(path: Path, at: int, bit: int = 0) -> bytes:
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :])
    return raw


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
    assert len(files) == 1 + 1 + 2 + 2 + 3 * 7 + 1
    for path in files:
        size = path.stat().st_size
        whole = path.name in ("settings.json", "manifest.json", "state.json")
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


def test_moving_blocks_are_not_judged_and_all_others_are(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    image = Image.open(store, writable=True)
    image.set_at(2, 20)
    image.set_moving(3)
    image.close()
    block = int(Bundle.open(store, 3).forward_map()["block"][0])
    flip(store.image / "data.img", block * BLOCK)
    assert check_store(store).ok
    flip(store.image / "data.img", (BLOCKS - 1) * BLOCK)
    assert [damage.offset for damage in check_store(store).damages] == [(BLOCKS - 1) * BLOCK]


def test_image_states_go_one_way(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)])
    with pytest.raises(PreconditionError, match="there is no image"):
        Image.open(store)
    image = Image.create(store, 7)
    image.set_baseline(9, {"data": 4096})
    assert read_state(store) == ImageState("baseline", from_write=7, journal_write=9, copied={"data": 4096})
    with pytest.raises(BugError):
        image.set_moving(1)
    image.set_at(0, 12)
    with pytest.raises(BugError):
        image.set_baseline(1, {})
    with pytest.raises(BugError):
        image.set_moving(2)
    image.set_moving(1)
    assert read_state(store) == ImageState("moving", boundary=0, write=12, to=1)
    image.close()


def test_image_against_a_model(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", 5000 * BLOCK)])
    image = Image.create(store, 1)
    model = bytearray(5000 * BLOCK)
    chooser = random.Random(1)
    for step in range(300):
        block = chooser.randrange(5000)
        count = chooser.randrange(1, min(5000 - block, chooser.choice([3, 3, 5000])) + 1)
        if chooser.random() < 0.3:
            image.zero_blocks(0, block, count)
            model[block * BLOCK : (block + count) * BLOCK] = bytes(count * BLOCK)
        else:
            data = (chooser.randbytes(16) * (count * BLOCK // 16)) if chooser.random() < 0.8 else bytes(count * BLOCK)
            image.write_blocks(0, block, data)
            model[block * BLOCK : (block + count) * BLOCK] = data
        if step % 20 == 0:
            whole = b"".join(data or bytes(n * BLOCK) for _, n, data in image.contents(0, 0, 5000))
            assert whole == model
            assert image.read_blocks(0, block, count) == model[block * BLOCK : (block + count) * BLOCK]
    image.close()
    assert (store.image / "data.img").read_bytes() == model
    assert (
        np.frombuffer((store.image / "data.sums").read_bytes(), dtype=np.uint64).tolist() == block_sums(model).tolist()
    )


def test_an_image_that_grows_is_zeros_behind_its_end(tmp_path: Path) -> None:
    """Whatever the files have there: blocks and sums would differ from the volume's."""
    store = make_store(tmp_path)
    for name in ("data.img", "data.sums"):
        with (store.image / name).open("ab") as file:
            file.write(random.Random(5).randbytes(2 * BLOCK))
    image = Image.open(store, writable=True)
    before = image.read_blocks(0, 0, BLOCKS)
    larger = image.grow(0, (BLOCKS + 4) * BLOCK)
    assert image.read_blocks(0, 0, BLOCKS) == before
    assert image.read_blocks(0, BLOCKS, 4) == bytes(4 * BLOCK)
    image.close()
    assert Store.open(store.path).volumes == larger.volumes == (Volume(0, "data", (BLOCKS + 4) * BLOCK),)
    assert check_store(larger).ok


def test_volumes_that_were_put_back_are_not_in_use(tmp_path: Path) -> None:
    volumes = [Volume(0, "data", BLOCK), Volume(1, "ts-one", BLOCK)]
    facts = {"mountpoints": {"data": "/pg"}, "filesystems": {"data": "ext4"}}
    store = Store.create(tmp_path / "store", "s", SET_ID, volumes, facts)
    assert [volume.name for volume in store.in_use] == ["data"]
    store = store.mounted("ts-one", Path("/one"), "xfs", 7)
    assert [volume.name for volume in Store.open(store.path).in_use] == ["data", "ts-one"]
    store = store.unmounted("ts-one")
    assert Store.open(store.path).in_use == store.in_use == (volumes[0],)
    assert store.since == {}


def test_catalog_is_rebuilt_from_the_store_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    catalog = Catalog.open(store)
    catalog.put_baseline(boundary(0))
    for number in store.interval_numbers():
        catalog.put_interval(Bundle.open(store, number))
    for ok in (True, False):
        catalog.remember("verification", 77, {"interval": 2, "ok": ok})
    catalog.remember("restore", 78, {"write": 5})
    before = (catalog.intervals(), catalog.baseline(), catalog.history("verification"), catalog.history("restore"))
    assert catalog.last_verification(2) == {"interval": 2, "ok": False, "time_ns": 77}
    assert catalog.last_verification(1) is None
    assert catalog.intervals()[2].interval == Bundle.open(store, 2).interval
    catalog.close()
    raw = catalog_file(store).read_bytes()
    for damage in (None, b"not a database" * 1000, raw[:100] + b"\xff" * 5000):
        for path in catalog_file(store).parent.glob("catalog.db*"):
            path.unlink()
        if damage is not None:
            catalog_file(store).write_bytes(damage)
        again, damages = rebuild(Store.open(store.path))
        assert not damages
        after = (again.intervals(), again.baseline(), again.history("verification"), again.history("restore"))
        assert after == before
        again.close()
    flip(store.interval(2) / "manifest.json", 30)
    again, damages = rebuild(store)
    assert [str(store.interval(2)) in damage.message for damage in damages] == [True]
    assert list(again.intervals()) == [1, 3]
    again.close()


def test_damaged_catalog_says_how_to_mend_it(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    Catalog.open(store).close()
    catalog_file(store).write_bytes(b"x" * 8192)
    with pytest.raises(DamageError, match=r"catalog\.db cannot be read") as caught:
        Catalog.open(store)
    assert "pgcdp rebuild" in str(caught.value.hint)


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


def test_an_image_that_cannot_be_written_can_be_closed(tmp_path: Path) -> None:
    """The agent closes what failed and goes on later: it must not fail at that and end."""
    store = Store.create(tmp_path / "store", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)])
    image = Image.create(store, 1)
    image.write_blocks(0, 0, b"x" * BLOCK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            image.sync()
        image.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_a_catalog_that_lies_is_not_believed(tmp_path: Path) -> None:
    """A flipped digit in a row, a missing row, one of before or of later, none at all: the manifests say the truth."""
    store = make_store(tmp_path)
    truth = {number: Bundle.open(store, number).interval for number in store.interval_numbers()}
    rebuild(store)[0].close()

    def listed() -> dict[int, Interval]:
        return {number: each.interval for number, each in published(store).items()}

    def change(statement: str) -> None:
        with sqlite3.connect(catalog_file(store)) as connection:
            assert connection.execute(statement).rowcount
        connection.close()

    change("update intervals set checksum = checksum")
    assert listed() == truth
    change("update intervals set content = replace(content, ', ', ', 9') where content like '[1, %'")
    assert listed() == truth
    change("delete from intervals where number = 2")
    assert listed() == truth
    with sqlite3.connect(catalog_file(store)) as connection:
        connection.executescript(
            "drop table intervals; create table intervals (number, content); pragma user_version = 1"
        )
    connection.close()
    assert listed() == truth
    rebuild(store)[0].close()
    with sqlite3.connect(catalog_file(store)) as connection:
        connection.execute("pragma user_version = 99")
    connection.close()
    later = Catalog.open(store)
    assert later.intervals() == {}
    later.close()
    assert listed() == truth
    catalog_file(store).write_bytes(b"not a database" * 1000)
    assert listed() == truth
    catalog_file(store).unlink()
    assert listed() == truth


def test_a_verification_that_the_catalog_tells_wrongly_is_not_told(tmp_path: Path) -> None:
    """A failed one must not become a right one by a flipped bit."""
    store = make_store(tmp_path)
    catalog = Catalog.open(store)
    catalog.remember("verification", 77, {"interval": 2, "ok": False})
    assert catalog.last_verification(2) == {"interval": 2, "ok": False, "time_ns": 77}
    catalog.close()
    with sqlite3.connect(catalog_file(store)) as connection:
        connection.execute("update history set content = replace(content, 'false', 'true')")
    connection.close()
    catalog = Catalog.open(store)
    assert catalog.last_verification(2) is None
    assert catalog.history("verification") == []
    with pytest.raises(DamageError, match="is not as it was written"):
        catalog.check()
    catalog.close()


def test_listing_intervals_passes_over_what_is_damaged(tmp_path: Path) -> None:
    """A point behind a damaged interval can be listed and opened: only who needs the damaged file is refused."""
    store = make_store(tmp_path)
    rebuild(store)[0].close()
    (store.interval(1) / "manifest.json").write_text("{}")
    with pytest.raises(DamageError):
        published(store)
    listed = survey(store)
    assert list(listed) == store.interval_numbers()
    assert (listed[1].interval.from_write, listed[1].interval.to_write, bool(listed[1].damage)) == (1, 10, True)
    assert not any(each.damage for number, each in listed.items() if number > 1)


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
