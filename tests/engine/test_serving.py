"""What a running capture process promises: bytes, order, status, memory, modes, refusals."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.service import Faults
from tests.fix_engine import BLOCK, LATE, MIB, Capture, Direct, MakeCapture
from tests.model import DISCARD, read_journal, replay
from tests.raw_workload import Workload, assert_history, erase, read_block
from tests.waiting import wait_until


def assert_volumes_equal_replay(capture: Capture) -> None:
    """After a clean stop or a sync: backing files are the baselines with every journalled write applied."""
    journal = read_journal(capture.journal)
    baseline = [capture.baseline(name).read_bytes() for name in capture.volumes]
    for name, expected in zip(capture.volumes, replay(baseline, journal.writes, journal.last_write), strict=True):
        assert capture.backing(name).read_bytes() == expected, f"volume {name} is not baseline plus journal"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bytes_and_order_of_a_random_workload(make_capture: MakeCapture, seed: int) -> None:
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB})
    capture.start()
    work = Workload(
        [capture.device(n) for n in capture.volumes], seed=seed, mark=lambda name: capture.request("mark", name=name)
    )
    work.run(250)
    assert capture.stop() == 0
    journal = read_journal(capture.journal)
    assert_history(work.ops, journal.writes)
    assert [w.number for w in journal.writes] == list(range(1, journal.last_write + 1))
    assert journal.mark is not None
    assert (journal.mark.clean, journal.mark.applied) == (True, journal.last_write)
    assert_volumes_equal_replay(capture)


def test_reads_see_what_was_just_written(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 8 * MIB})
    capture.start()
    with Direct(capture.device("data")) as volume:
        for i in range(300):
            block = i.to_bytes(8, "little") * (BLOCK // 8)
            volume.write(i % 7 * BLOCK, block * 2)
            assert volume.read(i % 7 * BLOCK, 2 * BLOCK) == block * 2
            wide = volume.read(0, 8 * BLOCK)
            assert wide[i % 7 * BLOCK : (i % 7 + 2) * BLOCK] == block * 2
        erase(volume.fd, DISCARD, BLOCK, 2 * BLOCK, device=False)
        assert volume.read(0, 4 * BLOCK)[BLOCK : 3 * BLOCK] == bytes(2 * BLOCK)


def test_concurrent_readers_see_whole_blocks_that_somebody_wrote(make_capture: MakeCapture) -> None:
    """While the applier lags behind: every block read is whole, in its place, and a counter never goes back."""
    capture = make_capture({"data": 4 * MIB})
    capture.start()
    work = Workload([capture.device("data")], seed=21, writers=3, max_blocks=16)
    work.start(operations=600)
    seen: dict[tuple[int, int], int] = {}
    reads = 0
    with Direct(capture.device("data")) as volume:
        while not work.ended():
            first = reads * 37 % (4 * MIB // BLOCK - 32)
            content = volume.read(first * BLOCK, 32 * BLOCK)
            reads += 1
            for i in range(32):
                who = read_block(content[i * BLOCK : (i + 1) * BLOCK])
                if who is None:
                    continue
                writer, counter, _, _, number, place = who
                assert (number, place) == (0, first + i)
                assert counter >= seen.get((writer, place), 0), f"block {place} went back to an older write"
                seen[writer, place] = counter
    work.join()
    assert reads > 50
    capture.stop()
    assert_history(work.ops, read_journal(capture.journal).writes)


def test_mark_and_cut_take_their_number_from_the_same_order(make_capture: MakeCapture) -> None:
    capture = make_capture()
    capture.start()
    with Direct(capture.device("data")) as volume:
        volume.write(0, bytes(BLOCK))
        reply = capture.request("mark", name="größer")
        volume.write(0, b"\1" * BLOCK)
    capture.stop()
    writes = read_journal(capture.journal).writes
    assert [(w.number, w.kind, w.data[:8]) for w in writes] == [
        (1, 1, bytes(8)),
        (2, 5, "größer".encode()),
        (3, 1, b"\1" * 8),
    ]
    assert 2 in reply.values()


def test_status_contract(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 8 * MIB, "wal": 4 * MIB})
    capture.start()
    with Direct(capture.device("data")) as volume:
        volume.write(0, b"x" * BLOCK)
        volume.write(0, b"y" * BLOCK)
    assert capture.request("sync").get("error") is None
    status = capture.status()
    assert capture.process is not None
    assert status["state"] == "capturing"
    assert status["pid"] == capture.process.pid
    numbers = ("last_write", "durable_write", "applied_write", "synced_write", "released_write")
    assert [status[key] for key in numbers] == [2, 2, 2, 2, 0]
    assert status["batch"] == 2
    assert status["position"]["segment"] >= 1
    assert status["position"]["offset"] % BLOCK == 0
    journal = status["journal"]
    assert (journal["limit"], journal["segment_bytes"]) == (capture.journal_limit, capture.segment_bytes)
    assert journal["segments"] >= 1
    assert [(v["name"], v["number"], v["bytes"], v["backing"]) for v in status["volumes"]] == [
        ("data", 0, 8 * MIB, str(capture.backing("data"))),
        ("wal", 1, 4 * MIB, str(capture.backing("wal"))),
    ]
    assert all("open" in v for v in status["volumes"])
    assert status["rss_kib"] > 0
    assert capture.backing("data").read_bytes()[:BLOCK] == b"y" * BLOCK


def test_unknown_requests_are_answered_with_an_error(make_capture: MakeCapture) -> None:
    capture = make_capture()
    capture.start()
    assert "error" in capture.request("dance")
    assert "error" in capture.request("mark")
    assert "error" in capture.request("release")
    assert capture.status()["last_write"] == 0


def test_files_are_private(make_capture: MakeCapture) -> None:
    capture = make_capture()
    capture.start()
    with Direct(capture.device("data")) as volume:
        for i in range(64):
            volume.write(i * 16 * BLOCK, bytes([i + 1]) * 16 * BLOCK)
    assert stat.S_IMODE(capture.journal.stat().st_mode) == 0o700
    assert stat.S_IMODE(capture.socket.stat().st_mode) == 0o600
    modes = {}
    for path in capture.journal.iterdir():
        with suppress(FileNotFoundError):  # the next segment gets its name just now
            modes[path.name] = stat.S_IMODE(path.stat().st_mode)
    assert {"lock", "applied", "0000000000000001.seg"} <= modes.keys()
    assert set(modes.values()) == {0o600}, modes


def test_memory_stays_small(make_capture: MakeCapture, engine_program: Path) -> None:
    """128 MiB; a sanitizer's shadow memory is not the engine's, so that build is only asked to survive."""
    capture = make_capture({"data": 64 * MIB}, segment_bytes=16 * MIB, journal_limit=1024 * MIB)
    capture.start()
    work = Workload([capture.device("data")], seed=9, writers=8, max_blocks=256)
    work.start()
    work.wait_answered(1500)
    work.finish()
    status = capture.status()
    if str(engine_program) != os.environ.get("PGCDP_ENGINE_ASAN"):
        assert status["rss_kib"] <= 128 * 1024


def test_discard_of_a_whole_volume_is_one_small_thing(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 512 * MIB})
    capture.start()
    with Direct(capture.device("data")) as volume:
        volume.write(256 * MIB, b"x" * BLOCK)
        erase(volume.fd, DISCARD, 0, 512 * MIB, device=False)
        assert volume.read(256 * MIB, BLOCK) == bytes(BLOCK)
    assert capture.request("sync").get("error") is None
    assert capture.stop() == 0
    journal = read_journal(capture.journal)
    assert journal.last_write <= 512
    assert sum(b.end - b.offset for b in journal.batches) < 8 * MIB
    with capture.backing("data").open("rb") as file:
        file.seek(256 * MIB)
        assert file.read(BLOCK) == bytes(BLOCK)


def test_full_journal_stalls_and_goes_on_after_release(make_capture: MakeCapture) -> None:
    capture = make_capture({"data": 16 * MIB}, segment_bytes=8 * MIB, journal_limit=32 * MIB)
    capture.allowed.append("the journal is full: writes wait")
    capture.start()
    work = Workload([capture.device("data")], seed=4, writers=2)
    work.start()
    wait_until(lambda: capture.status()["state"] == "stalled", timeout=60, what="stall")
    stalled = capture.status()
    assert stalled["journal"]["bytes"] <= stalled["journal"]["limit"]
    before = stalled["durable_write"]

    def release_and_look() -> bool:
        status = capture.status()
        capture.request("release", write=status["durable_write"])
        capture.request("sync")
        return bool(status["durable_write"] > before + 3000)

    wait_until(release_and_look, timeout=120, what="writes after the stall")
    work.stop.set()
    wait_until(lambda: release_and_look() or work.ended(), timeout=60, what="writers")
    work.join()
    assert capture.stop() == 0
    journal = read_journal(capture.journal)
    assert journal.segments[0].sequence > 1, "no segment was used again"
    assert sum(p.stat().st_size for p in capture.journal.iterdir()) <= capture.journal_limit + 2 * BLOCK
    expected = [bytearray(capture.backing("data").read_bytes())]
    assert replay(expected, journal.writes, journal.last_write)[0] == expected[0]
    assert capture.engine("check").returncode == 0


def test_a_segment_that_takes_long_is_no_full_journal(faulty_engine: Path, faults: Faults, scratch: Path) -> None:
    """A disk that others use, too: it is told, since writes wait for it, but raising the limit would not help."""
    capture = Capture(faulty_engine, scratch / "slow", {"data": 8 * MIB})
    faults.set("journal.segment.sync", "slow", milliseconds=3000)
    try:
        capture.start()
        with Direct(capture.device("data")) as volume:
            volume.write(0, bytes(BLOCK))
        assert faults.fired("journal.segment.sync")
        said = capture.log.read_text()
        assert said.index(LATE[0]) < said.index(LATE[1])
        assert "the journal is full" not in said
        assert capture.stop() == 0
    finally:
        capture.kill()


def test_second_capture_is_refused(make_capture: MakeCapture) -> None:
    capture = make_capture()
    capture.start()
    code, message = capture.run_refused()
    assert code == 6
    assert "pgcdp-engine: error: " in message
    assert "hint: " in message
    other = make_capture()
    other.volumes = capture.volumes
    os.unlink(other.backing("data"))
    os.link(capture.backing("data"), other.backing("data"))
    code, message = other.run_refused(create=True)
    assert code == 6, "two captures on one backing"
    assert capture.status()["state"] == "capturing"


def test_who_only_asks_whether_the_journal_is_locked_keeps_nobody_from_starting(make_capture: MakeCapture) -> None:
    """He has it shared for a moment, and so has a child that he starts just then."""
    capture = make_capture()
    capture.start()
    assert capture.stop() == 0
    lock = capture.journal / "lock"

    def has_opened_it() -> bool:
        assert capture.process is not None
        with suppress(OSError):
            return any(os.path.samefile(fd, lock) for fd in Path(f"/proc/{capture.process.pid}/fd").iterdir())
        return False

    with ThreadPoolExecutor(1) as pool, lock.open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        start = pool.submit(capture.start)
        wait_until(lambda: start.done() or (capture.process is not None and has_opened_it()), what="that it tries")
        fcntl.flock(asking, fcntl.LOCK_UN)
        start.result(timeout=60)
    assert capture.stop() == 0


def test_missing_journal_and_other_sets_are_refused(make_capture: MakeCapture) -> None:
    capture = make_capture()
    code, message = capture.run_refused()
    assert code == 6
    assert str(capture.journal) in message
    assert not capture.journal.exists()
    capture.start()
    capture.stop()
    capture.set_id = "0" * 32
    code, message = capture.run_refused()
    assert code == 6
    assert "hint: " in message


@pytest.mark.parametrize(
    "arguments",
    [[], ["--set-id=12"], ["--bogus"], ["--segment-bytes=1000"], ["--journal-limit=none"], ["no-equals-sign"]],
)
def test_wrong_usage(make_capture: MakeCapture, arguments: list[str]) -> None:
    capture = make_capture()
    command = capture.command(create=True) + arguments if arguments else [str(capture.program), "capture"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2, done.stderr
    assert "pgcdp-engine: error: " in done.stderr
    assert not capture.journal.exists()


def test_control_answers_while_the_journal_stalls(make_capture: MakeCapture) -> None:
    """Marks asked for during a stall are refused at once: none of them holds up the release that ends it."""
    capture = make_capture({"data": 16 * MIB}, segment_bytes=8 * MIB, journal_limit=32 * MIB)
    capture.allowed.append("the journal is full: writes wait")
    capture.start()
    work = Workload([capture.device("data")], seed=6, writers=2)
    work.start()
    wait_until(lambda: capture.status()["state"] == "stalled", timeout=60, what="stall")
    for i in range(40):  # more than there are connections
        for reply in (capture.request("mark", name=f"stalled {i}"), capture.request("cut")):
            assert reply["error"]["kind"] == "stalled"
    work.stop.set()

    def released() -> bool:
        capture.request("release", write=capture.status()["durable_write"])
        capture.request("sync")
        return bool(capture.status()["state"] == "capturing")

    wait_until(released, timeout=60, what="the stall's end")
    work.join()
    number = capture.request("mark", name="after it")["write"]
    assert capture.stop() == 0
    marks = [w for w in read_journal(capture.journal).writes if w.number == number]
    assert [m.data for m in marks] == [b"after it"]


def test_requests_during_the_stop_are_answered_or_refused(make_capture: MakeCapture) -> None:
    capture = make_capture()
    for _ in range(5):
        capture.start()
        stopping = threading.Event()

        def ask(stopping: threading.Event = stopping) -> None:
            for cmd in ["status", "sync", "cut"] * 10000:
                try:
                    capture.request(cmd)
                except (OSError, ValueError):
                    if stopping.is_set():
                        return

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        with Direct(capture.device("data")) as volume:
            for i in range(100):
                volume.write(i * BLOCK, b"z" * BLOCK)
        stopping.set()
        assert capture.stop() == 0
        for thread in threads:
            thread.join()


def test_odd_requests_change_nothing(make_capture: MakeCapture) -> None:
    """What is not of whole blocks, or lies outside the volume, is refused and takes no number."""
    capture = make_capture({"data": 1 * MIB})
    capture.start()
    file = os.open(capture.device("data"), os.O_RDWR)
    try:
        for offset, length in [(0, 100), (512, BLOCK), (BLOCK, 512), (MIB, BLOCK), (MIB - BLOCK, 2 * BLOCK)]:
            with pytest.raises(OSError, match=r"Invalid argument|No space left"):
                os.pwrite(file, b"q" * length, offset)
        with pytest.raises(OSError, match=r"Operation not (permitted|supported)|Function not implemented"):
            os.ftruncate(file, 2 * MIB)
        assert os.pread(file, BLOCK, MIB) == b""
    finally:
        os.close(file)
    assert capture.status()["last_write"] == 0
    assert capture.device("data").stat().st_size == MIB
