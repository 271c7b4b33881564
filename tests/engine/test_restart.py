"""Restarts: after a clean stop, after kill -9, with a torn tail, with damage."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.fix_engine import BLOCK, MIB, Capture, Direct, MakeCapture
from tests.golden.make_golden import JournalMaker
from tests.model import Wrong, read_journal, read_segment, replay
from tests.raw_workload import Workload, assert_history

KILLER = """
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>
int renameat(int from, const char *old, int to, const char *new)
{
    static int calls;
    if (++calls == 2)
        raise(SIGKILL);
    return (int)syscall(SYS_renameat2, from, old, to, new, 0);
}
"""
"""Loaded before the C library: kills the process at its second rename."""


def assert_volumes_equal_replay(capture: Capture) -> None:
    """Backing files are the baselines with every journalled write applied."""
    journal = read_journal(capture.journal)
    baseline = [capture.baseline(name).read_bytes() for name in capture.volumes]
    for name, expected in zip(capture.volumes, replay(baseline, journal.writes, journal.last_write), strict=True):
        assert capture.backing(name).read_bytes() == expected, f"volume {name} is not baseline plus journal"


def write_blocks(capture: Capture, count: int, seed: int = 0) -> None:
    """`count` answered writes of one block, one batch each."""
    rng = random.Random(seed)
    with Direct(capture.device("data")) as volume:
        for _ in range(count):
            volume.write(rng.randrange(1024) * BLOCK, rng.randbytes(8) * (BLOCK // 8))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ 0x40]))


def test_clean_stop_and_start_go_on_with_the_next_number(make_capture: MakeCapture) -> None:
    capture = make_capture()
    for i in range(4):
        capture.start()
        assert capture.status()["last_write"] == 10 * i
        write_blocks(capture, 10, seed=i)
        assert capture.stop() == 0
        assert_volumes_equal_replay(capture)
    journal = read_journal(capture.journal)
    assert [w.number for w in journal.writes] == list(range(1, 41))
    assert [b.number for b in journal.batches] == list(range(1, len(journal.batches) + 1))


def test_an_unused_journal_restarts(make_capture: MakeCapture) -> None:
    capture = make_capture()
    for _ in range(3):
        capture.start()
        capture.kill()
    capture.start()
    write_blocks(capture, 1)
    capture.stop()
    assert read_journal(capture.journal).last_write == 1


@pytest.mark.parametrize("released", [10, 9])
def test_a_journal_without_segments_goes_on_only_where_nothing_in_them_was_needed(
    make_capture: MakeCapture, released: int
) -> None:
    """Numbers go on behind the mark, also when it is killed before the next segment is made."""
    capture = make_capture({"data": 4 * MIB})
    capture.start()
    write_blocks(capture, 10)
    capture.request("release", write=released)
    assert capture.stop() == 0
    for segment in capture.journal.glob("*.seg"):
        segment.unlink()
    if released < 10:
        capture.allowed.append(r"error: journal .* has no segments")
        with pytest.raises(RuntimeError, match="has no segments, though 10 writes were in it"):
            capture.start()
        return
    for _ in range(2):
        capture.start()
        assert capture.status()["last_write"] == 10
        capture.kill()
    for segment in capture.journal.glob("*.seg"):
        shutil.move(segment, capture.root / segment.name)
    capture.allowed.append(r"error: journal .* has no segments")
    with pytest.raises(RuntimeError, match="has no segments"):  # one that was answered may have been there
        capture.start()
    for segment in capture.root.glob("*.seg"):
        shutil.move(segment, capture.journal / segment.name)
    capture.start()
    write_blocks(capture, 5, seed=1)
    capture.kill()
    capture.start()
    assert capture.status()["last_write"] == 15
    assert capture.stop() == 0
    written = read_journal(capture.journal).writes
    assert [write.number for write in written] == list(range(11, 16))
    content = capture.backing("data").read_bytes()
    assert all(content[w.offset : w.offset + w.length] == w.data for w in written[-1:])


@pytest.mark.parametrize("seed", range(5))
def test_restart_after_kill_under_load(make_capture: MakeCapture, seed: int) -> None:
    """Acknowledged writes are all there, the volumes equal baseline plus journal, numbers go on without gap."""
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB})
    rng = random.Random(seed)
    history = []
    for round_ in range(3):
        capture.start()
        work = Workload(
            [capture.device(n) for n in capture.volumes],
            seed=seed * 10 + round_,
            first_writer=10 * round_,
            mark=lambda name: capture.request("mark", name=name),
        )
        work.start()
        goal = rng.randint(1, 400)
        work.wait_answered(goal)
        capture.kill()
        work.finish()
        history += work.ops
    capture.start()
    last = capture.status()["last_write"]
    assert capture.stop() == 0
    journal = read_journal(capture.journal)
    assert journal.last_write == last
    assert [w.number for w in journal.writes] == list(range(1, last + 1))
    assert_history(history, journal.writes)
    assert_volumes_equal_replay(capture)
    assert capture.engine("check").returncode == 0


def test_volume_before_replay_never_holds_what_the_journal_lacks(make_capture: MakeCapture) -> None:
    """Truth 1: right after a kill each block of the volume is some journalled version of it, or the baseline's."""
    capture = make_capture({"data": 4 * MIB})
    capture.start()
    work = Workload([capture.device("data")], seed=77, max_blocks=8)
    work.start()
    work.wait_answered(500)
    capture.kill()
    work.finish()
    journal = read_journal(capture.journal)
    versions: list[set[bytes]] = [{bytes(BLOCK)} for _ in range(4 * MIB // BLOCK)]
    for write in journal.writes:
        for i in range(0, write.length, BLOCK):
            versions[(write.offset + i) // BLOCK].add(write.data[i : i + BLOCK] or bytes(BLOCK))
    content = capture.backing("data").read_bytes()
    strange = [i for i, v in enumerate(versions) if content[i * BLOCK : (i + 1) * BLOCK] not in v]
    assert strange == []


def test_torn_tail_is_cut_and_only_it(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 4 * MIB})
    capture.start()
    write_blocks(capture, 20)
    capture.kill()
    journal = read_journal(capture.journal)
    last = journal.batches[-1]
    path = capture.journal / f"{last.segment:016}.seg"
    flip(path, last.end - 1)
    before = path.read_bytes()
    check = capture.engine("check")
    assert (check.returncode, "torn" in check.stdout) == (0, True), check.stdout + check.stderr
    capture.start()
    assert capture.status()["last_write"] == 19
    write_blocks(capture, 5, seed=2)
    capture.stop()
    assert path.read_bytes()[BLOCK : last.offset] == before[BLOCK : last.offset]
    after = read_journal(capture.journal)
    assert [w.data for w in after.writes[:19]] == [w.data for w in journal.writes[:19]]
    assert after.last_write == 24
    assert after.batches[19].segment > last.segment
    # The write that was cut may have reached the volume before; its block may differ, and nothing else.
    again = make_capture({"data": 4 * MIB})
    shutil.copytree(capture.journal, again.journal)
    assert again.engine("check").returncode == 0


@pytest.mark.parametrize("where", ["header", "record", "data", "padding"])
def test_a_flipped_byte_in_an_acknowledged_batch_is_found(make_capture: MakeCapture, where: str) -> None:
    """Each of 25 batches in turn: check names it with exit 5, capture refuses to serve, nothing is cut off."""
    capture = make_capture({"data": 4 * MIB})
    capture.start()
    write_blocks(capture, 30)
    capture.stop()
    rng = random.Random(where)
    journal = read_journal(capture.journal)
    files = {path.name: path.read_bytes() for path in capture.journal.iterdir()}
    for batch in [*rng.sample(journal.batches[:-1], 24), journal.batches[-1]]:
        path = capture.journal / f"{batch.segment:016}.seg"
        offset = (
            batch.offset
            + {
                "header": rng.randrange(72),
                "record": rng.randrange(72, 120),
                "data": rng.randrange(BLOCK, 2 * BLOCK),
                "padding": rng.randrange(120, BLOCK),
            }[where]
        )
        flip(path, offset)
        check = capture.engine("check")
        assert check.returncode == 5, f"batch {batch.number}, offset {offset}: {check.stdout}"
        assert path.name in check.stderr
        assert f"offset {batch.offset}:" in check.stderr
        assert f"write{'s' if batch is not journal.batches[-1] else 's from'} {batch.first_write} " in check.stderr
        with pytest.raises(Wrong):
            read_journal(capture.journal)
        flip(path, offset)
    assert {path.name: path.read_bytes() for path in capture.journal.iterdir()} == files
    assert capture.engine("check").returncode == 0


def test_capture_refuses_a_damaged_journal_that_it_must_replay(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 4 * MIB})
    capture.start()
    write_blocks(capture, 30)
    capture.kill()
    journal = read_journal(capture.journal)
    assert journal.mark is not None
    victim = next(b for b in journal.batches if b.first_write > journal.mark.applied)
    assert victim is not journal.batches[-1], "nothing is left to replay"
    path = capture.journal / f"{victim.segment:016}.seg"
    flip(path, victim.end - 7)
    files = {path.name: path.read_bytes() for path in capture.journal.iterdir()}
    code, message = capture.run_refused()
    assert code == 5, message
    assert path.name in message
    assert f"offset {victim.offset}" in message
    assert {path.name: path.read_bytes() for path in capture.journal.iterdir()} == files


@pytest.mark.parametrize("offset", [0, 8, 16, 24, 32, 36, 40, 4096])
def test_a_segment_whose_first_batch_is_damaged_is_not_taken_for_empty(make_capture: MakeCapture, offset: int) -> None:
    """Its other batches may be all that is left of their writes: only a release may have it used again."""
    capture = make_capture({"data": 16 * MIB})
    capture.start()
    with Direct(capture.device("data")) as volume:
        for i in range(40):
            volume.write(i % 12 * MIB, os.urandom(BLOCK) * 256)
    capture.stop()
    first, second = sorted({b.segment for b in read_journal(capture.journal).batches})[:2]
    paths = [capture.journal / f"{number:016}.seg" for number in (first, second)]
    for path in paths:
        flip(path, BLOCK + offset)
    content = [path.read_bytes() for path in paths]
    for _ in range(2):
        capture.start()
        with Direct(capture.device("data")) as volume:
            for i in range(20):
                volume.write(i % 12 * MIB, os.urandom(BLOCK) * 256)
        capture.stop()
        assert [path.read_bytes() for path in paths] == content
    assert capture.engine("check").returncode == 5
    for path in paths:
        flip(path, BLOCK + offset)
    assert capture.engine("check").returncode == 0


def test_a_free_file_that_is_gone_does_not_stop_the_writing(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 16 * MIB}, segment_bytes=8 * MIB, journal_limit=64 * MIB)
    # The next try after one that finds no file comes a second later.
    capture.allowed += ["cannot use a segment again: No such file", "the journal is full: writes wait"]
    capture.start()
    removed = 0
    with Direct(capture.device("data")) as volume:
        for i in range(160):
            volume.write(i % 12 * MIB, os.urandom(BLOCK) * 256)
            capture.request("release", write=capture.status()["durable_write"])
            for path in capture.journal.glob("free-*"):
                path.unlink(missing_ok=True)
                removed += 1
    assert removed > 2
    assert capture.status()["state"] == "capturing"
    capture.stop()
    assert capture.engine("check").returncode == 0


def test_lost_and_foreign_segments_are_damage(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 16 * MIB})
    capture.start()
    with Direct(capture.device("data")) as volume:
        for i in range(96):
            volume.write(i % 12 * MIB, os.urandom(BLOCK) * (256 if i % 2 else 128))
    capture.stop()
    journal = read_journal(capture.journal)
    used = sorted({b.segment for b in journal.batches})
    assert len(used) >= 4
    for lost in (used[0], used[1], used[-1]):
        path = capture.journal / f"{lost:016}.seg"
        away = capture.root / "away"
        path.rename(away)
        assert capture.engine("check").returncode == 5, f"without segment {lost} of {used}"
        away.rename(path)
    middle = read_segment(capture.journal / f"{used[1]:016}.seg")
    flip(middle.path, 40)
    check = capture.engine("check")
    assert check.returncode == 5
    assert middle.path.name in check.stderr
    flip(middle.path, 40)
    assert capture.engine("check").returncode == 0


def test_unused_segments_behind_the_end_survive_a_kill_while_they_are_taken_back(make_capture: MakeCapture) -> None:
    """Two segments behind a torn tail: whatever a killed start renames first, the next start finds no hole."""
    capture = make_capture({"data": 4 * MIB})
    capture.start()
    write_blocks(capture, 5)
    capture.kill()
    maker = JournalMaker(capture.journal, segment_bytes=capture.segment_bytes, set_id=bytes.fromhex(capture.set_id))
    maker.sequence = max(int(p.name[:16]) for p in capture.journal.glob("*.seg"))
    maker.segment()
    maker.segment()
    before = len(list(capture.journal.glob("*.seg")))
    killer = capture.root / "killer.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", killer, "-x", "c", "-"], input=KILLER.encode(), check=True)
    environment = os.environ | {"LD_PRELOAD": str(killer), "ASAN_OPTIONS": "verify_asan_link_order=0"}
    done = subprocess.run(capture.command(create=False), env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(capture.journal.glob("*.seg"))) == before - 1
    assert capture.engine("check").returncode == 0
    capture.start()
    assert capture.status()["last_write"] == 5
    write_blocks(capture, 5)
    assert capture.stop() == 0
    assert read_journal(capture.journal).last_write == 10
