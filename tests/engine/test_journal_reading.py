"""dump and check on hand-made journals: the corners of FORMAT.md 1.5 that a running engine reaches rarely or never."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import xxhash

from tests.golden import make_golden as golden
from tests.golden.make_golden import BLOCK, DISCARD, MARK, Item, JournalMaker, block, mark, write
from tests.model import Wrong, read_frames, read_journal

GOLDEN = Path(golden.__file__).resolve().parent
KINDS = {1: "write", 2: "zero", 3: "discard", 5: "mark"}


def run(program: Path, command: str, journal: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), command, f"--journal={journal}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def numbers(program: Path, journal: Path, *arguments: str) -> list[int]:
    """Write numbers that dump lists."""
    done = run(program, "dump", journal, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["write"] for line in done.stdout.splitlines()]


def both_say_damage(program: Path, journal: Path, *words: str) -> str:
    """The engine and the model agree that it is damage; the engine's words."""
    with pytest.raises(Wrong):
        read_journal(journal)
    done = run(program, "check", journal)
    assert done.returncode == 5, done.stdout
    for word in words:
        assert word in done.stderr
    return done.stderr


def test_golden_files_are_what_the_maker_makes(tmp_path: Path) -> None:
    golden.make_journal(tmp_path / "journal")
    for path in (tmp_path / "journal").iterdir():
        assert path.read_bytes() == (GOLDEN / "journal" / path.name).read_bytes()


def test_golden_journal(engine_program: Path) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text("utf-8"))
    journal = read_journal(GOLDEN / "journal")
    assert journal.set_id is not None
    assert journal.set_id.hex() == expected["set_id"]
    assert [len(b.writes) for b in journal.batches] == expected["batches"]
    dumped = [
        json.loads(line) for line in run(engine_program, "dump", GOLDEN / "journal", "--json").stdout.splitlines()
    ]
    assert len(dumped) == len(journal.writes) == len(expected["records"])
    for want, witness, line in zip(expected["records"], journal.writes, dumped, strict=True):
        assert {
            "number": witness.number,
            "kind": witness.kind,
            "volume": witness.volume,
            "offset": witness.offset,
            "length": witness.length,
            "wall_ns": witness.wall_ns,
            "boot_ns": witness.boot_ns,
            "data_xxh3": f"{xxhash.xxh3_64_intdigest(witness.data):016x}",
        } == want
        assert (line["write"], line["kind"], line["wall_ns"]) == (want["number"], KINDS[want["kind"]], want["wall_ns"])
        if want["kind"] == MARK:
            assert line["name"] == witness.data.decode()
        else:
            assert (line["volume"], line["offset"], line["length"]) == (want["volume"], want["offset"], want["length"])
    check = run(engine_program, "check", GOLDEN / "journal")
    assert check.returncode == 0
    assert f"end: segment {expected['end']['segment']} offset {expected['end']['offset']}, then a torn" in check.stdout


def test_golden_frames() -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text("utf-8"))["frames"]
    frames = read_frames(GOLDEN / "writes.frames")
    assert (frames.content, frames.interval, frames.frames) == (expected["content"], expected["interval"], 3)
    assert frames.stream == block(1) + block(2) + block(3) * 3 + bytes(BLOCK)


def fill(maker: JournalMaker, batches: int) -> None:
    for i in range(batches):
        maker.batch(write(0, i * BLOCK, block(i)), mark(f"m{i}"))


def test_dump_ranges(engine_program: Path, tmp_path: Path) -> None:
    fill(JournalMaker(tmp_path / "j"), 20)
    for first, last in [(1, 40), (2, 2), (7, 31), (39, 50), (40, 40)]:
        listed = numbers(engine_program, tmp_path / "j", f"--from={first}", f"--to={last}")
        assert listed == list(range(first, min(last, 40) + 1))
    assert numbers(engine_program, tmp_path / "j", "--from=41") == []
    assert numbers(engine_program, tmp_path / "j", "--from=5", "--to=4") == []


def test_seek_past_a_torn_tail_does_not_believe_its_header(engine_program: Path, tmp_path: Path) -> None:
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 7)
    maker.torn(write(0, 0, block(9)), mark("never answered"))
    for first in (1, 14, 15, 16, 99):
        assert numbers(engine_program, tmp_path / "j", f"--from={first}") == list(range(first, 15))


def test_an_empty_journal(engine_program: Path, tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    assert numbers(engine_program, tmp_path / "j") == []
    maker = JournalMaker(tmp_path / "j")
    maker.segment()
    assert numbers(engine_program, tmp_path / "j") == []
    maker.torn(write(0, 0, block(1)))
    assert numbers(engine_program, tmp_path / "j") == []
    assert "torn" in run(engine_program, "check", tmp_path / "j").stdout


def test_segments_that_are_gone(engine_program: Path, tmp_path: Path) -> None:
    """Recycled ones are fine when applied, damage when not."""
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 20)
    first_of_3 = next(b for b in read_journal(tmp_path / "j").batches if b.segment == 3).first_write
    maker.applied(first_of_3 - 1, released=first_of_3 - 1)
    maker.path(1).unlink()
    maker.path(2).unlink()
    assert numbers(engine_program, tmp_path / "j") == list(range(first_of_3, 41))
    assert read_journal(tmp_path / "j").writes[0].number == first_of_3
    maker.applied(first_of_3 - 2)
    both_say_damage(engine_program, tmp_path / "j", f"begins with write {first_of_3}")


def test_a_hole_in_the_sequence(engine_program: Path, tmp_path: Path) -> None:
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 20)
    maker.path(2).unlink()
    both_say_damage(engine_program, tmp_path / "j", "0000000000000002.seg")


def test_a_new_segment_after_a_torn_tail(engine_program: Path, tmp_path: Path) -> None:
    """What a restart writes (1.6), also when the first batch after it is torn again and another restart follows."""
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 2)
    maker.torn(write(0, 0, block(50)))
    maker.segment()
    maker.batch(mark("after the restart"))
    assert numbers(engine_program, tmp_path / "j") == [1, 2, 3, 4, 5]
    maker.segment()
    maker.torn(mark("torn at once"))
    maker.segment()
    maker.batch(mark("after the second restart"))
    assert numbers(engine_program, tmp_path / "j") == [1, 2, 3, 4, 5, 6]
    assert [w.number for w in read_journal(tmp_path / "j").writes] == [1, 2, 3, 4, 5, 6]
    assert numbers(engine_program, tmp_path / "j", "--from=6") == [6]


def test_a_batch_whose_sync_failed_counts_where_it_was_written_again(engine_program: Path, tmp_path: Path) -> None:
    """Both copies are valid on the disk; only the later one was acknowledged, and the journal goes on behind it."""
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 1)
    again = [write(0, 0, block(7)), mark("twice")]
    maker.put(1, maker.offset, maker.encode(again))
    maker.segment()
    maker.put(2, BLOCK, maker.encode(again))
    maker.segment()
    maker.batch(*again)
    maker.batch(mark("behind"))
    journal = read_journal(tmp_path / "j")
    assert [(b.number, b.segment) for b in journal.batches] == [(1, 1), (2, 3), (3, 3)]
    assert numbers(engine_program, tmp_path / "j") == [1, 2, 3, 4, 5]
    listed = run(engine_program, "check", tmp_path / "j").stdout
    assert "0000000000000002.seg: 49152 bytes, no writes" in listed


def test_two_damages_are_both_named(engine_program: Path, tmp_path: Path) -> None:
    maker = JournalMaker(tmp_path / "j")
    offsets = []
    for i in range(20):
        at = maker.batch(write(0, i * BLOCK, block(i)))
        offsets.append((maker.sequence, at))
    for i in (3, 11):
        sequence, at = offsets[i]
        maker.put(sequence, at + BLOCK + 5, b"!")
    words = both_say_damage(engine_program, tmp_path / "j", "writes 4 to 4", "writes 12 to 12")
    assert words.count("pgcdp-engine: error: ") == 2
    assert "18 batches with 18 writes" in run(engine_program, "check", tmp_path / "j").stdout
    dump = run(engine_program, "dump", tmp_path / "j", "--json")
    assert dump.returncode == 5
    assert [json.loads(line)["write"] for line in dump.stdout.splitlines()] == [1, 2, 3]


def test_a_damaged_batch_before_a_torn_one_is_damage(engine_program: Path, tmp_path: Path) -> None:
    """Stricter than rule 4's wording: the torn batch's header proves that the one before it was durable."""
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 2)
    at = maker.batch(write(0, 0, block(5)))
    maker.torn(write(0, 0, block(6)))
    maker.put(maker.sequence, at + BLOCK, b"!")
    check = run(engine_program, "check", tmp_path / "j")
    assert check.returncode == 5
    assert f"offset {at}:" in check.stderr


def test_the_last_batch_below_the_applied_mark_is_not_a_torn_tail(engine_program: Path, tmp_path: Path) -> None:
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 2)
    at = maker.batch(write(0, 0, block(5)))
    maker.put(maker.sequence, at + BLOCK, b"!")
    assert run(engine_program, "check", tmp_path / "j").returncode == 0
    maker.applied(0)
    both_say_damage(engine_program, tmp_path / "j", f"offset {at}:", "writes from 5 on")


def test_the_only_batch_of_the_only_segment(engine_program: Path, tmp_path: Path) -> None:
    """Older segments are gone, all was applied, the first batch of what is left is damaged."""
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 4)
    maker.segment()
    at = maker.batch(write(0, 0, block(5)))
    maker.applied(9, released=9)
    for sequence in range(1, maker.sequence):
        maker.path(sequence).unlink()
    assert numbers(engine_program, tmp_path / "j") == [9]
    maker.put(maker.sequence, at + BLOCK, b"!")
    both_say_damage(engine_program, tmp_path / "j", f"offset {at}:", "writes up to 9")


def test_applied_mark(engine_program: Path, tmp_path: Path) -> None:
    """One slot is enough; none is damage; none on a journal whose beginning is gone is damage too."""
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 20)
    for slots in ((0,), (1,), (0, 1)):
        maker.applied(3, slots=slots)
        assert "applied write 3" in run(engine_program, "check", tmp_path / "j").stdout
    content = bytearray((tmp_path / "j" / "applied").read_bytes())
    content[50] ^= 1
    content[BLOCK + 50] ^= 1
    (tmp_path / "j" / "applied").write_bytes(content)
    both_say_damage(engine_program, tmp_path / "j", "applied")
    (tmp_path / "j" / "applied").unlink()
    maker.path(1).unlink()
    assert run(engine_program, "check", tmp_path / "j").returncode == 5


@pytest.mark.parametrize("field", [0, 8, 16, 32, 40, 48, 64, 100, 4095])
def test_a_damaged_segment_header(engine_program: Path, tmp_path: Path, field: int) -> None:
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 20)
    content = bytearray(maker.path(2).read_bytes())
    content[field] ^= 1
    maker.path(2).write_bytes(content)
    both_say_damage(engine_program, tmp_path / "j", "0000000000000002.seg", "offset 0")
    maker.path(2).write_bytes(content[: BLOCK // 2])
    both_say_damage(engine_program, tmp_path / "j", "0000000000000002.seg")


def test_segments_of_two_sets(engine_program: Path, tmp_path: Path) -> None:
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 2)
    maker.set_id = bytes(16)
    maker.segment()
    done = run(engine_program, "check", tmp_path / "j")
    assert done.returncode == 6
    assert "another volume set" in done.stderr
    assert "hint: " in done.stderr


@pytest.mark.parametrize(
    "items",
    [
        [Item(DISCARD, 0, 1, length=BLOCK)],
        [Item(4, 0, 0, length=BLOCK)],
        [Item(9)],
        [Item(1, 0, 0, block(1), 2 * BLOCK)],
        [Item(1, 0, 0, block(1), BLOCK, flags=1)],
        [Item(MARK, 65535, 0, b"7", flags=5)],
    ],
    ids=["unaligned", "flush", "unknown kind", "data of another length", "rewind that is no mark", "unknown mark"],
)
def test_batches_that_contradict_themselves(engine_program: Path, tmp_path: Path, items: list[Item]) -> None:
    maker = JournalMaker(tmp_path / "j")
    fill(maker, 1)
    maker.batch(*items)
    maker.batch(mark("behind"))
    both_say_damage(engine_program, tmp_path / "j", "write 3 ")


def test_records_of_a_rewind_are_told_from_marks(engine_program: Path, tmp_path: Path) -> None:
    maker = JournalMaker(tmp_path / "j")
    maker.segment()
    maker.batch(mark("before"), Item(MARK, 65535, 0, b"7", flags=1), Item(MARK, 65535, 0, b"7", flags=2))
    told = run(engine_program, "dump", tmp_path / "j").stdout.splitlines()
    assert [line.split()[2:4] for line in told] == [
        ["mark", '"before"'], ["rewind-begin", '"7"'], ["rewind-end", '"7"'],
    ]  # fmt: skip


def test_wrong_usage_and_missing_journal(engine_program: Path, tmp_path: Path) -> None:
    for command in ("dump", "check"):
        done = run(engine_program, command, tmp_path / "nowhere")
        assert (done.returncode, "nowhere" in done.stderr, "hint: " in done.stderr) == (6, True, True)
        assert run(engine_program, command, tmp_path, "--bogus").returncode == 2
        assert run(engine_program, command, tmp_path, "extra").returncode == 2
    assert run(engine_program, "dump", tmp_path, "--from=x").returncode == 2
    assert run(engine_program, "check", tmp_path, "--from=1").returncode == 2
