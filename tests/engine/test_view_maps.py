"""A block map that is wrong in any byte or rule is refused, and a right one is read as Python wrote it."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import tests.golden.make_golden as golden
from pgcdp.records import BLOCK, EXTENT_DATA, EXTENT_ZEROS, RecoveryPoint
from pgcdp.recovery.mapfile import ImageSource, ViewMap, encode
from tests.fix_views import ShowMap
from tests.unit.test_blockmap import Scene
from tests.view_maps import big_map, mended


def test_a_damaged_map_is_exit_5_and_never_a_crash(show_map: ShowMap, scratch: Path, engine_program: Path) -> None:
    """Flipped bytes; and flipped, cut and grown ones under a checksum that fits, which is what a bug would write."""
    scene = Scene(scratch / "scene", 4, [8, 8], 4, 4)
    whole = encode(scene.mapped(RecoveryPoint(12, None, 0)))
    chooser = random.Random(6)
    place = scratch / "map"

    def outcome(raw: bytes) -> int:
        place.write_bytes(raw)
        done = subprocess.run([str(engine_program), "map", str(place)], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1, 5), f"{done.returncode}: {done.stderr}"
        assert done.returncode != 1 or "UTF-8" in done.stderr
        assert done.returncode != 5 or f"{place} has" in done.stderr
        return done.returncode

    assert outcome(whole) == 0
    for _ in range(25):
        raw = bytearray(whole)
        raw[chooser.randrange(len(raw))] ^= 1 << chooser.randrange(8)
        assert outcome(bytes(raw)) == 5
    seen = set()
    for number in range(150):
        raw = bytearray(whole)
        for _ in range(chooser.randrange(1, 4)):
            at = chooser.randrange(8, 700 if number % 2 else len(raw))
            raw[at : at + 1] = chooser.choice([b"\xff", b"\x00", b"\x80", chooser.randbytes(1)])
        if chooser.randrange(4) == 0:
            raw = raw[: chooser.randrange(64, len(raw))] if chooser.randrange(2) else raw + bytes(32)
        if chooser.randrange(2):
            raw[32:40] = struct.pack("<Q", len(raw))
        seen.add(outcome(mended(raw)))
    assert seen >= {0, 5}
    view = show_map(scene.mapped(RecoveryPoint(12, None, 0)), start=False)
    view.map_file.write_bytes(whole[:-1])
    code, said = view.refused()
    assert code == 5
    assert str(view.map_file) in said


def broken_maps(good: ViewMap) -> dict[str, ViewMap]:
    """Maps that break one rule of FORMAT.md 5 each."""

    def extents(column: str, value: int, row: int = 1) -> ViewMap:
        changed = good.extents.copy()
        changed[column][row] = value
        return replace(good, extents=changed)

    def named(name: str) -> ViewMap:
        return replace(good, volumes=(replace(good.volumes[0], name=name),))

    def sized(size: int) -> ViewMap:
        return replace(good, volumes=(replace(good.volumes[0], bytes=size),))

    def at(path: str) -> ViewMap:
        return replace(good, sources=(ImageSource(Path(path)), good.sources[1]))

    twice = (good.volumes[0], replace(good.volumes[0], number=1))
    return {
        "overlaps": extents("block", 1),
        "lies outside": extents("block", 1 << 40, -1),
        "lies outside of its": extents("count", 1 << 31, -1),
        "an extent that": extents("count", 0),
        "wrong volume": extents("volume", 1),
        "extent of an unknown kind": extents("kind", 2),
        "extent without a source": extents("source", 2),
        "an extent without": extents("source", 0),
        "without a source at": extents("position", (1 << 64) - BLOCK),
        "a volume whose name": named(""),
        "whose name cannot be": named("a/b"),
        "name cannot be at": named(".."),
        "cannot be at offset": named("n" * 64),
        "a volume whose name cannot be": replace(good, volumes=twice, images=(0, 0)),
        "a volume whose size": sized(1 << 60),
        "whose size cannot be": sized((1 << 30) + 1),
        "size cannot be": sized(0),
        "a volume without an image": replace(good, images=(1,)),
        "without an image": replace(good, images=(2,)),
        "a path that is none": at("relative/path"),
        "path that is none": at("/with\0nul"),
        "a source whose path": at("/" + "p" * 5000),
        "a wrong number of volumes": replace(good, volumes=(), images=()),
    }


def test_each_rule_of_a_map_is_asked(scratch: Path, engine_program: Path) -> None:
    good = big_map(scratch, 2)
    place = scratch / "map"

    def outcome(view_map: ViewMap) -> tuple[int, str]:
        place.write_bytes(encode(view_map))
        done = subprocess.run([str(engine_program), "map", str(place)], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert outcome(good) == (0, "")
    for said, view_map in broken_maps(good).items():
        code, text = outcome(view_map)
        assert code == 5, said
        assert said in text


def test_the_engine_reads_the_golden_map(engine_program: Path) -> None:
    place = Path(golden.__file__).with_name("view.map")
    done = subprocess.run([str(engine_program), "map", str(place)], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = json.loads(place.with_name("expected.json").read_text("utf-8"))["map"]
    assert [[row["volume"], row["bytes"], row["source"]] for row in rows if "volume" in row] == wanted["volumes"]
    assert [[r["source"], r["content"], r["interval"], r["path"]] for r in rows if "path" in r] == wanted["sources"]
    keys = ("block", "count", "on", "kind", "position", "source")
    assert [[row[key] for key in keys] for row in rows if "block" in row] == wanted["extents"]


def test_the_engine_lists_what_python_wrote(scratch: Path, engine_program: Path) -> None:
    scene = Scene(scratch / "scene", 4, [8, 8], 4, 4)
    view_map = scene.mapped(RecoveryPoint(20, None, 0))
    (scratch / "map").write_bytes(encode(view_map))
    done = subprocess.run(
        [str(engine_program), "map", str(scratch / "map")], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["volume"], row["bytes"]) for row in rows if "volume" in row] == [
        (v.name, v.bytes) for v in view_map.volumes
    ]
    assert [row["path"] for row in rows if "path" in row] == [str(source.path) for source in view_map.sources]
    found = [(r["block"], r["count"], r["on"], r["kind"], r["position"], r["source"]) for r in rows if "block" in r]
    kinds = {EXTENT_DATA: "data", EXTENT_ZEROS: "zeros"}
    assert found == [(b, c, v, kinds[k], p, s) for b, c, v, k, p, s, _ in view_map.extents.tolist()]
