"""A protected set on disks that lose their power, and the judge of what it must be when the power is back.

Power truth: `up` recovers; every commit that was acknowledged is there; the volume is the baseline with every write of
store and journal on it, by `model` alone; image, catalog and store agree; cutting goes on.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from pgcdp import api, service
from pgcdp.errors import PgcdpError
from pgcdp.records import Target
from pgcdp.store.bundle import Bundle
from pgcdp.store.catalog import Catalog
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import Store
from tests.fix_power import Machine
from tests.fix_sets import ProtectedSet, reap
from tests.model import Wrong, apply, read_interval, read_journal, read_json, read_open_interval, read_store, require
from tests.survivors import Survivors
from tests.waiting import pass_time, wait_until


class Lost(AssertionError):
    """Something of the power truth does not hold."""


LOSSES: tuple[type[Exception], ...] = (PgcdpError, Wrong, AssertionError, TimeoutError, psycopg.Error)
BROKEN: tuple[type[Exception], ...] = (FileNotFoundError, ValueError, struct.error)
"""How the model falls over a file that is not there or ends early."""
PATIENCE = 40.0
"""Seconds until what should go on by itself counts as not going on."""


@contextmanager
def judged(what: str, *more: type[Exception]) -> Iterator[None]:
    """What goes wrong inside is a loss."""
    try:
        yield
    except (*LOSSES, *more) as error:
        raise Lost(f"{what}: {error!r}") from error


class Witness:
    """The volumes as the model makes them: the first image, and the writes of each interval as it is published."""

    def __init__(self, found: ProtectedSet) -> None:
        self._found = found
        with self._image_at():
            self._volumes = read_store(found.store).image_at_boundary(0)
        self._write = int(read_json(found.store / "store.json")["baseline"]["write"])
        self._interval = 0

    def follow(self, upto: int) -> None:
        """Take in what was published since, at most up to a boundary."""
        while (
            self._interval < upto
            and (directory := self._found.store / "intervals" / f"{self._interval + 1:010}").exists()
        ):
            writes = read_interval(directory).writes
            require(writes[0].number == self._write + 1, f"{directory} begins with write {writes[0].number}")
            for write in writes:
                apply(self._volumes, write)
            self._write = writes[-1].number
            self._interval += 1

    def assert_volumes(self) -> None:
        """The volumes, which nothing serves now, are what store and journal say."""
        self.follow(sys.maxsize)
        expected = [bytearray(volume) for volume in self._volumes]
        opened = self._found.store / "incoming" / f"{self._interval + 1:010}"
        last = self._write
        for write in [*read_open_interval(opened), *read_journal(self._found.config.journal).writes]:
            if write.number > last:
                require(write.number == last + 1, f"write {write.number} follows {last}")
                apply(expected, write)
                last = write.number
        for volume, content in zip(self._found.config.volumes, expected, strict=True):
            different = first_different_block(volume.backing, content)
            require(different is None, f"volume {volume.name}: block {different} is not what was captured")

    def assert_image(self) -> None:
        """The backup image is what it says: a boundary, at which it is held while it is read."""
        with self._image_at() as boundary:
            self.follow(boundary)
            require(self._interval == boundary, f"the image is at boundary {boundary}, {self._interval} was published")
            image = read_store(self._found.store, intervals=False).image()
        require(image == self._volumes, f"the image is not boundary {boundary}")

    @contextmanager
    def _image_at(self) -> Iterator[int]:
        """The image held where it is, when it has got there: the boundary."""
        with image_held(Store.open(self._found.store)):
            wait_until(lambda: self._image_state()["state"] == "at", what="an image that has moved")
            yield int(self._image_state()["boundary"])

    def _image_state(self) -> dict[str, Any]:
        return read_json(self._found.store / "image" / "state.json")


def first_different_block(device: Path, content: bytearray) -> int | None:
    """Read past any cache of the kernel's."""
    piece = 1 << 20
    file = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, piece) as memory:
            for at in range(0, len(content), piece):
                count = os.preadv(file, [memory], at)
                wanted = content[at : at + piece]
                if memory[:count] != wanted:
                    blocks = range(0, len(wanted), 4096)
                    return next((at + i) // 4096 for i in blocks if memory[i : i + 4096] != wanted[i : i + 4096])
    finally:
        os.close(file)
    return None


@dataclass(frozen=True)
class Lit:
    """What the clients connect to: nothing is captured in the dark, though the capture process may still be there."""

    machine: Machine
    found: ProtectedSet

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return self.found.connect(database)

    def capturing(self) -> bool:
        return not self.machine.dead


class PowerTruth:
    """Cuts of the power under load, each judged."""

    def __init__(self, machine: Machine, found: ProtectedSet, load: Survivors, seed: int) -> None:
        self.machine = machine
        self.found = found
        self.load = load
        self.witness = Witness(found)
        self.cuts = 0
        self._rng = random.Random(seed)

    def round(self, verify: bool = True) -> dict[str, Any]:
        """One cut, at a random moment or in place of some sync of some disk. What was seen; Lost."""
        before = self.load.acknowledged()
        boundary = self._newest()
        began, at_first = time.monotonic(), self.machine.status()
        self.load.wait_for(self._rng.randint(20, 200))
        moment, told = self._cut(began, at_first)
        self.cuts += 1
        self.machine.off()
        reap()
        self.load.pause()
        acknowledged = self.load.acknowledged() - before
        self.machine.on()
        with judged("down"):
            api.down(self.found.name)
        with judged("volume", *BROKEN):
            self.witness.assert_volumes()
        with judged("up"):
            self.found.up()
        with judged("commits"):
            self.load.assert_kept(self.found)
        self.load.resume()
        self._goes_on(boundary, verify)
        return {"moment": moment, "commits": acknowledged, "interval": self._newest(), "disks": told}

    def _cut(self, began: float, at_first: dict[str, dict[str, int]]) -> tuple[str, dict[str, dict[str, int]]]:
        seed = self._rng.getrandbits(32)
        pass_time(0.2 + self._rng.random())
        if self._rng.random() < 0.5:
            return "at once", self.machine.cut(seed)
        # By the rate of each disk under this load, so that none is waited for in vain.
        seconds = time.monotonic() - began
        syncs = {name: disk["syncs"] - at_first[name]["syncs"] for name, disk in self.machine.status().items()}
        rates = {name: count / seconds for name, count in syncs.items() if count > 2}
        if not rates:
            return "at once", self.machine.cut(seed)
        disk = self._rng.choice(list(rates))
        count, before = self._rng.randint(1, 1 + int(2 * rates[disk])), self.load.acknowledged()
        self.machine.arm(seed, disk, count)
        try:
            return f"sync of {disk}", self.machine.fallen()
        except TimeoutError as error:
            commits = self.load.acknowledged() - before
            raise AssertionError(
                f"{error}: sync {count} of {disk} ({rates}) has not come, {commits} commits since. "
                f"{self.machine.status()}, {api.status(self.found.name)}"
            ) from None

    def _newest(self) -> int:
        return max((int(path.name) for path in (self.found.store / "intervals").glob("[0-9]*")), default=0)

    def _goes_on(self, boundary: int, verify: bool) -> None:
        """Commits, cuts, and all that is stored."""
        with judged("load"):
            self.load.wait_for(20, PATIENCE)
        with judged("agent"):
            self._await_agent()
            assert api.cut(self.found.name)["number"] > boundary, "no new interval was published"
            self.load.pause()  # so that what is read stays as it is, nearly
        with judged("image", *BROKEN):
            self.witness.assert_image()
        with judged("catalog"):
            wait_until(self._catalog_is_whole, timeout=PATIENCE, what="the catalog has every interval")
        if verify:
            with judged("check"):
                self._check()
                assert api.verify(self.found.name, Target("newest"))["ok"]
        self.load.resume()

    def _await_agent(self) -> None:
        """It follows the journal again; what it says instead comes with the TimeoutError."""
        state: dict[str, Any] = {}

        def follows() -> bool:
            with suppress(service.AgentGone):
                state.update(service.ask(self.found.config.paths, "status"))
            error = state.get("error") or ""
            assert "damage" not in error, error  # it does not go away by waiting
            return state.get("phase") == "following" and not error

        try:
            wait_until(follows, timeout=PATIENCE, what="the agent follows")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {state.get('error')}") from None

    def _check(self) -> None:
        wrong = [each for each in api.check(self.found.name, full=True)["checks"] if not each["ok"]]
        assert not wrong, wrong

    def _catalog_is_whole(self) -> bool:
        """It has what each manifest says. A cut that the period asked for may just be under way."""
        store = Store.open(self.found.store)
        catalog = Catalog.open(store)
        try:
            known = {number: told.interval for number, told in catalog.intervals().items()}
        finally:
            catalog.close()
        return known == {number: Bundle.open(store, number).interval for number in store.interval_numbers()}


@contextmanager
def under_load(machine: Machine, found: ProtectedSet, seed: int) -> Iterator[PowerTruth]:
    """With clients that note what was acknowledged to them."""
    with Survivors(Lit(machine, found), clients=6, seed=seed) as load:
        try:
            yield PowerTruth(machine, found, load, seed)
        except BaseException:
            machine.off()  # else clients may wait for an answer that never comes
            raise


def rounds(truth: PowerTruth, count: int, every: int = 1) -> list[dict[str, Any]]:
    """So many cuts; every so many times all that is stored is read, and the newest write verified."""
    return [truth.round(verify=number % every == 0) for number in range(count)]
