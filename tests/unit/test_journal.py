"""The journal reader: what it must find, what it must never hand out, and where a journal may end."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pgcdp.capture.engine import find_engine
from pgcdp.capture.journal import Journal, LostWritesError
from pgcdp.errors import DamageError
from pgcdp.records import Position
from tests.journal_writer import BLOCK, DISCARD, MARK, WRITE, ZERO, JournalWriter, Op, encode_batch
from tests.waiting import wait_until

SET_ID = bytes(range(16))


def write_op(seed: int, blocks: int = 1, volume: int = 0) -> Op:
    chooser = random.Random(seed)
    return Op(WRITE, volume, chooser.randrange(1000) * BLOCK, blocks * BLOCK, chooser.randbytes(blocks * BLOCK))


def some_ops(chooser: random.Random) -> list[Op]:
    ops = []
    for _ in range(chooser.randrange(1, 6)):
        kind = chooser.choice([WRITE, WRITE, WRITE, ZERO, DISCARD, MARK])
        if kind == WRITE:
            ops.append(write_op(chooser.randrange(1 << 30), chooser.randrange(1, 5), chooser.randrange(2)))
        elif kind == MARK:
            ops.append(Op(MARK, data=f"märk {chooser.randrange(100)}".encode()))
        else:
            ops.append(
                Op(kind, chooser.randrange(2), chooser.randrange(100) * BLOCK, chooser.randrange(1, 10**6) * BLOCK)
            )
    return ops


def make(tmp_path: Path, batches: int = 60, seed: int = 1) -> tuple[JournalWriter, list[Op]]:
    chooser = random.Random(seed)
    writer = JournalWriter(tmp_path / "journal", SET_ID)
    ops: list[Op] = []
    for _ in range(batches):
        part = some_ops(chooser)
        writer.append(part)
        ops += part
    return writer, ops


def collect(journal: Journal, after: int, upto: int | None) -> list[tuple[int, int, bytes]]:
    out = []
    for run in journal.batches(after, upto):
        for i, record in enumerate(run.records):
            out.append((int(record["number"]), int(record["kind"]), run.data_of(i).tobytes()))
    return out


def expected(ops: list[Op], after: int, upto: int) -> list[tuple[int, int, bytes]]:
    return [(i, ops[i - 1].kind, ops[i - 1].data) for i in range(after + 1, upto + 1)]


def test_every_range_is_read_and_trimmed(tmp_path: Path) -> None:
    writer, ops = make(tmp_path)
    journal = Journal(writer.directory, SET_ID)
    assert len(journal.segments()) > 3
    chooser = random.Random(2)
    for _ in range(100):
        after = chooser.randrange(len(ops))
        upto = chooser.randrange(after, len(ops)) + 1
        assert collect(journal, after, upto) == expected(ops, after, upto)
    assert journal.last_write() == len(ops)


def test_reading_on_where_the_last_call_ended(tmp_path: Path) -> None:
    writer, ops = make(tmp_path)
    journal = Journal(writer.directory, SET_ID)
    chooser = random.Random(3)
    after, start, got = 0, None, []
    while after < len(ops):
        upto = min(len(ops), after + chooser.randrange(1, 9))
        for run in journal.batches(after, upto, start):
            got += run.records["number"].tolist()
            start = run.end
        after = upto
    assert got == list(range(1, len(ops) + 1))


def test_runs_stay_as_they_are_while_others_are_read(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal", SET_ID, segment_bytes=3 << 20)
    ops: list[Op] = []
    for seed in range(60):
        part = [write_op(seed, 64), write_op(seed + 1000, 1)]
        writer.append(part)
        ops += part
    journal = Journal(writer.directory, SET_ID)
    pairs = list(zip(journal.batches(0, len(ops)), journal.batches(20, len(ops)), strict=False))
    assert len(pairs) > 2
    for runs in zip(*pairs, strict=True):
        for run in runs:
            for i, number in enumerate(run.records["number"].tolist()):
                assert run.data_of(i).tobytes() == ops[number - 1].data
            assert not run.data.flags.writeable


def test_run_splits_at_any_write(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=10)
    (run,) = list(Journal(writer.directory, SET_ID).batches(0, len(ops)))
    assert run.batch_ends.tolist() == [placed.last for placed in writer.placed]
    for write in range(len(ops) + 1):
        low, high = run.upto(write), run.after(write)
        assert len(low) == write
        assert len(high) == len(ops) - write
        for part in (low, high):
            for i, number in enumerate(part.records["number"].tolist()):
                assert part.data_of(i).tobytes() == ops[number - 1].data


def test_recycled_segments_with_old_batches_in_them(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=20)
    writer.new_segment(old=writer.path(1).read_bytes()[BLOCK:])
    journal = Journal(writer.directory, SET_ID)
    assert journal.last_write() == len(ops)
    more = [write_op(7)]
    writer.append(more)
    assert collect(journal, len(ops) - 3, len(ops) + 1) == expected(ops + more, len(ops) - 3, len(ops) + 1)
    writer.path(1).rename(writer.directory / f"free-{1:016d}")
    first = next(placed.first for placed in writer.placed if placed.segment == 2)
    assert collect(journal, first - 1, len(ops)) == expected(ops, first - 1, len(ops))
    with pytest.raises(DamageError, match=f"begins with write {first}, write {first - 1} is wanted"):
        collect(journal, first - 2, len(ops))


@pytest.mark.parametrize("first_of_segment", [False, True])
def test_sealed_segment_is_left_where_the_next_says(tmp_path: Path, first_of_segment: bool) -> None:
    writer, ops = make(tmp_path, batches=20)
    if first_of_segment:
        writer.new_segment()
    writer.given_up([write_op(100), write_op(101)])
    more = [write_op(200), write_op(201), write_op(202)]
    writer.append(more)
    writer.append([write_op(203)])
    ops += [*more, write_op(203)]
    journal = Journal(writer.directory, SET_ID)
    assert collect(journal, 0, len(ops)) == expected(ops, 0, len(ops))
    assert collect(journal, len(ops) - 4, len(ops)) == expected(ops, len(ops) - 4, len(ops))
    assert journal.last_write() == len(ops)
    assert journal.last_write(len(ops) - 1) == len(ops)


def test_torn_tail_ends_the_journal_only_if_nobody_was_answered(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=20)
    torn = [write_op(1, 3)]
    for keep in (1, 100, BLOCK, 2 * BLOCK, 4 * BLOCK - 1):
        writer.torn(torn, keep)
        journal = Journal(writer.directory, SET_ID)
        assert journal.last_write() == len(ops)
        writer.mark(1, 1, len(ops))
        assert journal.last_write() == len(ops)
        assert collect(journal, 3, len(ops)) == expected(ops, 3, len(ops))
        writer.mark(1, 1, len(ops) + 1)
        with pytest.raises(DamageError, match=f"write {len(ops) + 1} was durable"):
            journal.last_write()
        (writer.directory / "applied").unlink()
    with pytest.raises(DamageError):
        collect(journal, 0, len(ops) + 1)


def test_after_a_torn_tail_the_next_segment_goes_on(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=20)
    writer.torn([write_op(1, 3)], 2 * BLOCK)
    writer.new_segment()
    writer.append([write_op(5)])
    journal = Journal(writer.directory, SET_ID)
    assert journal.last_write() == len(ops) + 1
    assert collect(journal, 0, len(ops) + 1) == expected([*ops, write_op(5)], 0, len(ops) + 1)


def test_bytes_behind_the_durable_write_are_not_judged(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=20)
    writer.torn([write_op(1, 3)], 5000)
    journal = Journal(writer.directory, SET_ID)
    (run,) = list(journal.batches(0, len(ops)))
    assert run.last_write == len(ops)
    writer.append([write_op(1, 3)])
    assert [r.first_write for r in journal.batches(len(ops), len(ops) + 1, run.end)] == [len(ops) + 1]


def handed_out(journal: Journal, upto: int) -> int:
    """The last write that comes before damage does."""
    last = 0
    with suppress(LostWritesError):
        for run in journal.batches(0, upto):
            last = run.last_write
    return last


def test_one_flipped_byte_in_any_batch_is_found(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=40)
    journal = Journal(writer.directory, SET_ID)
    chooser = random.Random(5)
    for placed in writer.placed:
        for at in (chooser.randrange(72), chooser.randrange(placed.length)):
            path = writer.path(placed.segment)
            raw = path.read_bytes()
            writer.poke(
                placed.segment, placed.offset + at, bytes([raw[placed.offset + at] ^ (1 << chooser.randrange(8))])
            )
            with pytest.raises(DamageError, match=r"\.seg has a damaged batch at offset \d+") as caught:
                collect(journal, 0, len(ops))
            assert f"{placed.segment:016d}.seg" in caught.value.message
            assert f"offset {placed.offset}" in caught.value.message
            assert f"{placed.first} to {len(ops)} are lost" in caught.value.message
            assert caught.value.hint is not None
            assert f"up to write {placed.first - 1} " in caught.value.hint
            assert handed_out(journal, len(ops)) == placed.first - 1, (
                "all that lies before it is given, to who will find it nowhere else"
            )
            if placed.first > 1:
                assert collect(journal, 0, placed.first - 1) == expected(ops, 0, placed.first - 1)
            if placed is not writer.placed[-1]:
                with pytest.raises(DamageError):
                    journal.last_write()
            path.write_bytes(raw)


def test_flipped_segment_header_is_damage(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=40)
    journal = Journal(writer.directory, SET_ID)
    raw = writer.path(2).read_bytes()
    for at in (0, 9, 20, 33, 44, 50, 60, 64, 2000, 4095):
        writer.poke(2, at, bytes([raw[at] ^ 4]))
        with pytest.raises(DamageError, match=f"{2:016d}.seg"):
            collect(journal, 0, len(ops))
        writer.path(2).write_bytes(raw)


def test_missing_segment_is_damage(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=40)
    writer.path(2).unlink()
    journal = Journal(writer.directory, SET_ID)
    with pytest.raises(DamageError, match=f"{2:016d}.seg is missing"):
        collect(journal, 0, len(ops))
    with pytest.raises(DamageError):
        journal.last_write()


def test_valid_batch_with_a_wrong_number_does_not_belong(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=10)
    op = [write_op(1)]
    salt = writer.salts[writer.segment]
    for number, first, previous in (
        (writer.number + 1, writer.write, writer.previous),
        (writer.number, writer.write + 1, writer.previous),
        (writer.number, writer.write, (writer.segment, writer.offset - BLOCK)),
    ):
        writer.poke(writer.segment, writer.offset, encode_batch(salt, number, first, op, previous))
        with pytest.raises(DamageError):
            collect(Journal(writer.directory, SET_ID), 0, len(ops) + 1)


def test_journal_of_another_set_is_refused(tmp_path: Path) -> None:
    writer, ops = make(tmp_path, batches=5)
    with pytest.raises(DamageError, match="belongs to set"):
        collect(Journal(writer.directory, bytes(16)), 0, len(ops))


def test_applied_mark_survives_one_torn_slot(tmp_path: Path) -> None:
    writer, _ = make(tmp_path, batches=5)
    journal = Journal(writer.directory, SET_ID)
    assert journal.applied_mark() is None
    writer.mark(3, 2, 5, sequence=8)
    old = (writer.directory / "applied").read_bytes()
    writer.mark(4, 2, 5, sequence=9, clean=True)
    new = (writer.directory / "applied").read_bytes()
    for raw, sequence in ((new[:BLOCK] + old[BLOCK:], 9), (new[:64] + old[64:], 8), (old[:BLOCK] + new[BLOCK:], 9)):
        (writer.directory / "applied").write_bytes(raw)
        mark = journal.applied_mark()
        assert mark is not None
        assert mark.sequence == sequence
        assert (mark.released_write, mark.durable_write, mark.clean) == (2, 5, sequence == 9)
    broken = bytearray(new)
    broken[100] ^= 1
    broken[BLOCK + 40] ^= 1
    (writer.directory / "applied").write_bytes(broken)
    with pytest.raises(DamageError, match="no valid slot"):
        journal.applied_mark()


def test_empty_journal(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal", SET_ID)
    journal = Journal(writer.directory, SET_ID)
    assert journal.last_write() == 0
    writer.new_segment()
    assert journal.last_write() == 0
    with pytest.raises(DamageError, match="no valid batch with write 1"):
        collect(journal, 0, 1)


def test_data_offsets_skip_padding(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal", SET_ID)
    writer.append([Op(MARK, data=b"one"), write_op(1), Op(MARK, data=b"three"), write_op(2, 2)])
    (run,) = list(Journal(writer.directory, SET_ID).batches(0, 4))
    assert run.data_offsets.tolist() == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]
    assert np.array_equal(run.records["volume"], [65535, 0, 65535, 0])


def test_read_while_it_is_written_and_recycled(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal", SET_ID)
    journal = Journal(writer.directory, SET_ID)
    chooser = random.Random(12)
    batches = [some_ops(chooser) for _ in range(400)]
    ops = [op for part in batches for op in part]
    durable, released = [0], [0]

    def write_all() -> None:
        for part in batches:
            durable[0] = writer.append(part).last
            for segment in journal.segments():
                last = max((placed.last for placed in writer.placed if placed.segment == segment), default=durable[0])
                if segment < writer.segment and last <= released[0]:
                    writer.path(segment).rename(writer.directory / f"free-{segment:016d}")

    thread = threading.Thread(target=write_all)
    thread.start()
    start: Position | None = None
    while released[0] < len(ops):
        upto = durable[0]
        for run in journal.batches(released[0], upto, start if chooser.random() < 0.8 else None):
            for i, number in enumerate(run.records["number"].tolist()):
                assert run.data_of(i).tobytes() == ops[number - 1].data
            assert run.first_write == released[0] + 1
            released[0], start = run.last_write, run.end
        assert released[0] == upto
    thread.join()
    assert len(journal.segments()) < writer.segment


def test_a_live_journal_that_is_recycled_under_a_check_is_not_called_damaged(tmp_path: Path) -> None:
    """The engine is in the middle of it when segments that it has not read yet are given away."""
    writer = JournalWriter(tmp_path / "journal", SET_ID, 2 * READ_BYTES)
    for number in range(200):
        writer.append([write_op(number, 256)])
    segments = sorted(writer.directory.glob("*.seg"))
    free = {segment: segment.with_name(f"free-{segment.stem}") for segment in segments[:-2]}
    command = [str(find_engine()), "check", "--journal", str(writer.directory)]
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as check:
            wait_until(lambda pid=check.pid: bytes_read(pid) > READ_BYTES, interval=0, what="the check reads batches")  # type: ignore[misc]
            check.send_signal(signal.SIGSTOP)
            writer.mark(applied=200, released=200, durable=200)
            for segment, given in free.items():
                segment.rename(given)
            check.send_signal(signal.SIGCONT)
            told, _ = check.communicate()
        assert check.returncode == 0
        assert "writes 1 to 200" in told
        if f"{segments[0].name}:" not in told:
            break
        for segment, given in free.items():  # it was not stopped in time: whoever shall stop it waited for a processor
            given.rename(segment)
    else:
        pytest.fail("it was never stopped in time")


@pytest.mark.parametrize("rate", ["4194304", "0"])
def test_a_check_reads_no_faster_than_it_may(tmp_path: Path, rate: str) -> None:
    """Production's disk has other work; and what is written meanwhile does not keep it from its end."""
    writer = JournalWriter(tmp_path / "journal", SET_ID, 2 * READ_BYTES)
    for number in range(4):
        writer.append([write_op(number, 128)])
    began = time.monotonic()
    done = subprocess.run(
        [str(find_engine()), "check", "--journal", str(writer.directory), "--rate", rate],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "writes 1 to 4" in done.stdout
    assert int(rate) == 0 or time.monotonic() - began > 0.9 * 4 * 128 * 4096 / int(rate)


def test_a_rate_that_is_none_is_refused(tmp_path: Path) -> None:
    words = [str(find_engine()), "check", "--journal", str(tmp_path), "--rate", "fast"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert '"fast" is not a number of bytes a second' in done.stderr


READ_BYTES = 4 << 20


def bytes_read(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])
