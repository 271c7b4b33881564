"""The capture process is killed with a request in its hands: the next one is asked again, where that does no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pgcdp.capture import control
from pgcdp.capture.control import AnswerLost, EngineClient, EngineGone
from tests.engine.test_held import Held
from tests.faults.service import Faults
from tests.fix_engine import MIB
from tests.model import MARK, read_journal
from tests.waiting import wait_until

SLOW_MS = 120_000
"""How long a disk takes that is waited for with the request: longer than the test lets its process live."""
Ask = Callable[[EngineClient], Any]


@pytest.fixture
def held(faulty_engine: Path, faults: Faults, scratch: Path) -> Iterator[Held]:
    """One volume behind a holder, captured."""
    capture = Held(faulty_engine, scratch / "set", {"data": 8 * MIB})
    capture.hold()
    capture.start()
    capture.wait_ready()
    yield capture
    capture.end()
    assert capture.complaints() == [], "in the engine's log"


def client(held: Held) -> EngineClient:
    return EngineClient(held.socket)


def marks(held: Held) -> list[tuple[str, int]]:
    """Name and flags of each mark in the journal, in order."""
    return [(each.data.decode(), each.flags) for each in read_journal(held.journal).writes if each.kind == MARK]


@contextmanager
def in_its_hands(held: Held, waits: Callable[[], object], *asks: Ask) -> Iterator[list[Future[Any]]]:
    """Each request has reached the capture process, and is not answered as long as its disk is slow.

    `waits`: whether the first of them waits for that disk; what comes behind it then waits, too.
    """
    assert held.process is not None
    tasks = Path(f"/proc/{held.process.pid}/task")
    with ThreadPoolExecutor(len(asks)) as pool:
        told = []
        for ask in asks:
            known = set(tasks.iterdir())  # of a connection before, perhaps, one that ends just now
            told.append(pool.submit(ask, client(held)))
            wait_until(lambda before=known: set(tasks.iterdir()) - before, what="its thread for the connection")  # type: ignore[misc]
            wait_until(waits, what="that it waits for its disk")
        yield told


def replaced(
    held: Held, faults: Faults, point: str, *asks: Ask, first: Callable[[], object] = lambda: None
) -> list[Future[Any]]:
    """What becomes of requests that wait for `point` as their process is killed; the next one serves.

    `first` is done with its disk slow already: what it leaves to be done must not be done before.
    """
    faults.set(point, "slow", milliseconds=SLOW_MS)
    first()
    with in_its_hands(held, lambda: faults.fired(point), *asks) as told:
        assert not any(each.done() for each in told)
        held.crash()
        held.start()
    return told


def test_what_may_be_done_twice_is_asked_of_the_next_one(held: Held, faults: Faults) -> None:
    begun, cut = replaced(
        held, faults, "journal.batch.sync", lambda asked: asked.rewind_record("begin", "1"), lambda asked: asked.cut()
    )
    assert begun.result() == held.status()["last_write"]
    assert cut.result() >= 1
    assert {name for name, _ in marks(held)} == {"1"}
    (synced,) = replaced(
        held, faults, "journal.mark.sync", lambda asked: asked.sync(),
        first=lambda: client(held).rewind_record("end", "1"),
    )  # fmt: skip
    assert synced.result() >= begun.result()
    assert held.stop() == 0


@pytest.mark.parametrize(
    "ask",
    [lambda asked: asked.mark("here"), lambda asked: asked.gap_record("end", "changed 1")],
    ids=["a mark", "an end record"],
)
def test_what_would_be_there_twice_is_not(held: Held, faults: Faults, ask: Ask) -> None:
    """Its batch was written, so it is there; whoever asked is told that this is not known."""
    client(held).gap_record("begin", "changed 1")
    known = marks(held)
    (told,) = replaced(held, faults, "journal.batch.sync", ask)
    with pytest.raises(AnswerLost, match=r"ended before it answered whether the (mark|end record)") as lost:
        told.result()
    assert "pgcdp" in str(lost.value.hint)
    assert len(marks(held)) == len(known) + 1, "the journal has it twice, or lost it"
    assert held.stop() == 0


def test_who_asks_while_none_serves_waits_for_the_next_one(held: Held) -> None:
    """Nothing was asked yet, so nothing can be there twice."""
    held.crash()
    asks: list[Ask] = [
        lambda asked: asked.mark("here"),
        lambda asked: asked.cut(),
        lambda asked: asked.grow("data", 8 * MIB),
        lambda asked: asked.next_status().last_write,
    ]
    with ThreadPoolExecutor(len(asks)) as pool:
        told = [pool.submit(ask, client(held)) for ask in asks]
        wait_until(lambda: all(each.running() for each in told), what="that all of them wait")
        held.start()
        assert told[0].result() > 0
        assert told[1].result() >= 0
        assert told[2].result() is None
        assert told[3].result() >= 0
    assert marks(held) == [("here", 0)]
    assert held.stop() == 0


def test_nobody_waits_without_a_holder_nor_for_ever(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    held.crash()
    monkeypatch.setattr(control, "SUCCESSOR_SECONDS", 0.5)
    with pytest.raises(EngineGone, match="no engine answers"):
        client(held).cut()
    monkeypatch.setattr(control, "SUCCESSOR_SECONDS", 3600.0)
    with pytest.raises(EngineGone, match="no engine answers"):
        client(held).status()  # who asks for it asks whether one serves
    assert held.holder is not None
    held.holder.kill()
    held.holder.wait()
    with pytest.raises(EngineGone, match="no engine answers"):
        client(held).mark("here")
