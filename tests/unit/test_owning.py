"""Who has a store, and what a backing really is: two machines, a copied root, another path to the same bytes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp.capture.sharing import Bytes, bytes_of
from pgcdp.errors import PreconditionError
from pgcdp.fsio import write_json
from pgcdp.machine import Place
from pgcdp.records import Volume
from pgcdp.store import lease
from pgcdp.store.layout import Store
from pgcdp.store.lease import Lease, owner_of, refuse_other, take_over
from tests.waiting import pass_time, wait_until

HERE = Place("/", "a" * 32, "uuid-1", "one", "boot-1")
THERE = replace(HERE, machine="b" * 32, host="two", boot="boot-2")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store", "s", bytes(range(16)), [Volume(0, "data", 4096)])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits, shorter."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.02)


@pytest.fixture
def patient(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is watched until a renewal is seen, which may wait long for a disk that others use, too."""
    monkeypatch.setattr(lease, "WATCH_SECONDS", 60.0)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (replace(HERE, host="renamed", boot="boot-9"), True),
        (replace(HERE, root="/copy"), False),
        (replace(HERE, machine="c" * 32), False),
        (replace(HERE, hardware="uuid-2"), False),
        (replace(HERE, machine="", hardware=""), True),
    ],
)
def test_a_copy_is_another_place_and_a_restart_is_not(other: Place, same: bool) -> None:
    assert HERE.is_same(other) == same
    assert Place.of(HERE.as_json()) == HERE


def test_a_second_machine_is_refused_and_the_first_goes_on(store: Store) -> None:
    held = Lease.take(store, HERE)
    with pytest.raises(PreconditionError, match=r"belongs to one \(machine id a+") as told:
        Lease.take(store, THERE)
    assert "--take-over" in str(told.value.hint)
    with pytest.raises(PreconditionError, match="belongs to one"):
        refuse_other(store, replace(HERE, root="/copy"))
    held.keep()
    held.release()
    with pytest.raises(PreconditionError, match="which let go of it on"):
        Lease.take(store, THERE)
    Lease.take(store, HERE).release()


def test_two_agents_of_one_machine(store: Store) -> None:
    held = Lease.take(store, HERE)
    with pytest.raises(PreconditionError, match="is locked by the agent"):
        Lease.take(store, HERE)
    held.release()


@pytest.mark.usefixtures("patient")
def test_a_store_that_is_still_renewed_is_not_taken_over(store: Store) -> None:
    """By a thread of its own: whatever else the agent waits for."""
    held = Lease.take(store, HERE)
    with pytest.raises(PreconditionError, match="is in use by one"):
        take_over(store, THERE)
    clone = replace(HERE, boot="boot-2")  # a copy of the machine that cannot tell that it is one
    with pytest.raises(PreconditionError, match="is in use by one"):
        lease._refuse_renewed(store, owner_of(store), lambda moment: None)  # type: ignore[arg-type]
    assert clone.is_same(HERE)
    held.keep()
    held.release()
    before = renewals(store)
    pass_time(0.3)
    assert renewals(store) == before


def died(held: Lease) -> None:
    """Its process did, as by a power cut."""
    held._ended.set()
    held._thread.join()
    held._lock.release()


@pytest.mark.usefixtures("quick")
def test_who_was_taken_over_writes_no_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1000.0)  # as of a machine that is stopped
    held = Lease.take(store, HERE)
    begun = time.monotonic()
    take_over(store, THERE)
    assert time.monotonic() - begun >= lease.WATCH_SECONDS, "it must be seen that nobody renews it"
    wait_until(lambda: held.lost, what="its loss")
    with pytest.raises(PreconditionError, match="was taken over by two"):
        held.keep()
    held.release()
    owner = owner_of(store)
    assert owner is not None
    assert owner.place == THERE, "what it lost is not its own to let go of"
    Lease.take(store, THERE).release()


@pytest.mark.parametrize("point", ["rename", "fsync"])
def test_a_renewal_that_fails_is_said_and_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, quick: None, point: str
) -> None:
    """Whether it came there or not, it is no sign of another."""
    held = Lease.take(store, HERE)
    with monkeypatch.context() as failing:
        plain = lease._write

        def write(*arguments: object, **more: object) -> None:
            if point == "fsync":
                plain(*arguments, **more)  # type: ignore[arg-type]
            raise OSError(5, "Input/output error", "owner.json")

        failing.setattr(lease, "_write", write)
        wait_until(lambda: held._trouble is not None, what="the failure")
        with pytest.raises(OSError, match="Input/output error"):
            held.keep()
        pass_time(0.3)
    wait_until(lambda: held._trouble is None, what="a renewal")
    held.keep()
    assert not held.lost
    held.release()
    owner = owner_of(store)
    assert owner is not None
    assert owner.released


def renewals(store: Store) -> int:
    owner = owner_of(store)
    return 0 if owner is None else owner.renewals


@pytest.mark.usefixtures("patient")
def test_after_a_start_of_the_machine_a_copy_that_runs_is_noticed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a machine has its machine id: what gives it away is that somebody renews while it has just started."""
    died(Lease.take(store, HERE))
    again = replace(HERE, boot="boot-2")
    ended = threading.Event()
    content = {"set": "s", "set_id": store.set_id.hex(), "place": HERE.as_json(), "released": False, "renewed_ns": 5}

    def other() -> None:
        count = 100
        while not ended.wait(0.05):
            count += 1
            write_json(store.path / lease.FILE, {**content, "renewals": count})

    renewing = threading.Thread(target=other)
    renewing.start()
    try:
        wait_until(lambda: renewals(store) > 100, what="a renewal")
        with pytest.raises(PreconditionError, match="is in use by one"):
            Lease.take(store, again)
    finally:
        ended.set()
        renewing.join()
    monkeypatch.setattr(lease, "WATCH_SECONDS", 1.0)
    Lease.take(store, again).release()


def test_a_damaged_note_is_nobodys(store: Store) -> None:
    (store.path / lease.FILE).write_text("{")
    Lease.take(store, THERE).release()


def test_bytes_that_overlap(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(8192))
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    (tmp_path / "other").write_bytes(bytes(8192))
    found = bytes_of(file)
    for same in ("link", "hard"):
        assert bytes_of(tmp_path / same).overlap(found)
    assert not bytes_of(tmp_path / "other").overlap(found)
    first, second = Bytes((1, 2), 0, 4096), Bytes((1, 2), 4096, 8192)
    assert not first.overlap(second)
    assert first.overlap(Bytes((1, 2), 4095, 4097))
