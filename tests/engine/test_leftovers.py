"""Files of the journal that a failing disk does not remove take room that nobody uses: they go when it works again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.service import Faults
from tests.fix_engine import MIB, Capture, Direct
from tests.waiting import wait_until


@pytest.fixture
def capture(faulty_engine: Path, faults: Faults, scratch: Path) -> Iterator[Capture]:
    """Started, with fault points."""
    made = Capture(faulty_engine, scratch / "faulty", {"data": 16 * MIB}, allowed=[r"journal: "])
    made.start()
    yield made
    made.kill()


def files(capture: Capture) -> list[str]:
    """Those that hold a journal, or could."""
    patterns = ("new-*", "free-*", "*.seg")
    return sorted(each.name for pattern in patterns for each in capture.journal.glob(pattern))


def write(capture: Capture, segments: int) -> None:
    """So many segments full."""
    with Direct(capture.device("data")) as volume:
        for _ in range(segments):
            for at in range(0, 8 * MIB, MIB):
                volume.write(at, b"1" * MIB)


def settled(capture: Capture) -> bool:
    """As many files as the engine counts, and one of them ready."""
    journal = capture.status()["journal"]
    return bool(journal["segments"] == len(files(capture)) and not any("new-" in each for each in files(capture)))


def release(capture: Capture) -> None:
    """All that is durable is stored."""
    assert "error" not in capture.request("sync")
    capture.request("release", write=capture.status()["durable_write"])
    assert "error" not in capture.request("sync")


@pytest.mark.parametrize(
    ("fails", "keeps"),
    [("journal.segment.header", "journal.segment.unlink"), ("journal.recycle.directory", "journal.recycle.give_up")],
)
def test_a_file_that_could_not_be_removed_goes_later(capture: Capture, faults: Faults, fails: str, keeps: str) -> None:
    faults.set("journal.leftover.unlink", "eio", times=2)
    faults.set(keeps, "eio", times=2)
    faults.set(fails, "eio", times=2)
    for _ in range(4):
        write(capture, 2)
        release(capture)
    wait_until(lambda: faults.fired(keeps), what=keeps)
    wait_until(lambda: len(faults.fired("journal.leftover.unlink")) == 2, what="it is tried again")
    wait_until(lambda: settled(capture), what="all that is of no use is gone")
    assert capture.stop() == 0


def test_a_journal_on_a_disk_that_keeps_everything_goes_on(capture: Capture, faults: Faults) -> None:
    """More than can be remembered: the next start removes the rest."""
    faults.set("journal.leftover.unlink", "eio", times=0)
    faults.set("journal.recycle.give_up", "eio", times=0)
    faults.set("journal.recycle.directory", "eio", times=8)
    for _ in range(8):
        write(capture, 2)
        release(capture)
    faults.clear_all()
    wait_until(lambda: settled(capture), what="all that is of no use is gone")
    assert capture.stop() == 0
