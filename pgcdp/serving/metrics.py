"""What Prometheus scrapes from the agent: numbers of the set, at each scrape (names: docs/operations.md).

Most of them the loop has at hand. What lies in the store is read anew at most every STORE_SECONDS, and left out while
it cannot be read: a number of before the disk failed would hide just that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.registry import Collector

from pgcdp import __version__, forecast, keeping
from pgcdp.capture.control import EngineStatus
from pgcdp.config import Config
from pgcdp.errors import PgcdpError
from pgcdp.records import Interval
from pgcdp.store.base import read_base
from pgcdp.store.catalog import Catalog
from pgcdp.store.layout import Store
from pgcdp.store.published import Published, published
from pgcdp.store.scrub_record import Record, read_record

STATES = ("capturing", "tracking", "stalled", "stopped")
STORE_SECONDS = 15.0
HISTORY = 100
"""So many of the newest verifications are looked through for one that found all right."""
AGES = {
    "cut": "the newest boundary, by the wall clock of its write",
    "look": "the last whole look at the catalogs",
    "verified": "the newest verification that found all right",
    "scrub": "the oldest part of the store was read",
}


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the loop has at hand. Times are ns since 1970, `look_seconds` an age, `rates` as `serving.rates` tells them;
    None: not known."""

    status: EngineStatus | None
    store: Store | None
    error: str | None
    errors_total: int
    newest_boundary_ns: int | None
    newest_write_ns: int | None
    stored_write: int | None
    look_seconds: float | None
    rates: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """What the store holds, as of a moment."""

    oldest_ns: int | None
    intervals: list[Interval]
    verified_ns: int | None
    scrub: Record


class _Looks:
    """Reads the store, one at a time, and remembers it for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at = -STORE_SECONDS
        self._known: Mapping[int, Published] = {}
        self._stored: Stored | None = None

    def stored(self, store: Store) -> Stored | None:
        """None when it cannot be read now."""
        if not self._lock.acquire(timeout=1.0):  # another scrape waits for the disk
            return None
        try:
            if time.monotonic() - self._at >= STORE_SECONDS:
                self._stored = None
                with suppress(PgcdpError, OSError):
                    self._stored = self._read(store)
                self._at = time.monotonic()
            return self._stored
        finally:
            self._lock.release()

    def _read(self, store: Store) -> Stored:
        self._known = published(store, self._known)
        intervals = [each.interval for each in self._known.values()]
        base = read_base(store)
        return Stored(None if base is None else base.time_ns, intervals, _verified(store), read_record(store))


def _verified(store: Store) -> int | None:
    catalog = Catalog.open(store)
    try:
        found = catalog.history("verification", HISTORY)
    finally:
        catalog.close()
    return next((int(each["time_ns"]) for each in found if each.get("ok")), None)


class SetCollector(Collector):
    """The metrics of one set; `numbers` is called at each scrape, from a thread of its own."""

    def __init__(self, config: Config, numbers: Callable[[], Numbers]) -> None:
        self._config = config
        self._numbers = numbers
        self._looks = _Looks()

    def collect(self) -> Iterable[Metric]:
        """One scrape."""
        name, numbers = self._config.name, self._numbers()
        stored = None if numbers.store is None else self._looks.stored(numbers.store)
        yield from _of_agent(self._config, numbers)
        if numbers.status is not None:
            yield from _of_engine(name, numbers.status)
        if stored is not None:
            yield from _of_store(name, stored.intervals, numbers.status)
            yield _damages(name, stored.scrub)
        yield from _of_times(name, numbers, stored)
        yield self._full_in(numbers, [] if stored is None else stored.intervals)

    def _full_in(self, numbers: Numbers, intervals: list[Interval]) -> Metric:
        found = forecast.as_json(self._config, numbers.status, {"rates": numbers.rates}, intervals)
        ahead = {"journal": found["journal"], "store": found["store"]}
        ahead.update({f"volume {each['name']}": each for each in found["volumes"]})
        family = GaugeMetricFamily(
            "pgcdp_full_in_seconds",
            "Until it is full at the present rate; the journal, if the store took nothing any more.",
            labels=["set", "what"],
        )
        for what, each in ahead.items():
            if each is not None and each["seconds"] is not None:
                family.add_metric([self._config.name, what], each["seconds"])
        return family


def _gauge(set_name: str, name: str, help: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"pgcdp_{name}", help, labels=["set"])
    family.add_metric([set_name], value)
    return family


def _counter(set_name: str, name: str, help: str, value: float) -> CounterMetricFamily:
    family = CounterMetricFamily(f"pgcdp_{name}", help, labels=["set"])
    family.add_metric([set_name], value)
    return family


def _of_agent(config: Config, numbers: Numbers) -> Iterator[Metric]:
    name = config.name
    info = InfoMetricFamily("pgcdp_agent", "The agent that tells this.", labels=["set"])
    info.add_metric([name], {"version": __version__})
    yield info
    now = keeping.state_of(config, numbers.status)
    state = StateSetMetricFamily("pgcdp_state", "What capture is at; one of these is 1.", labels=["set"])
    state.add_metric([name], {each: each == now for each in STATES})
    yield state
    problems = (1 if numbers.error else 0) + (len(numbers.status.errors) if numbers.status is not None else 0)
    yield _gauge(name, "problems", "What keeps agent or engine from their work now.", problems)
    yield _counter(name, "errors", "Problems of the agent since it started.", numbers.errors_total)


def _of_engine(name: str, status: EngineStatus) -> Iterator[Metric]:
    yield _gauge(name, "journal_bytes", "Bytes of the journal in use.", status.journal_bytes)
    yield _gauge(name, "journal_limit_bytes", "Most bytes that the journal may take.", status.journal_limit)
    blocks = status.tracked.blocks if status.tracked is not None else 0
    yield _gauge(
        name, "tracked_blocks", "Blocks that changed while the journal could not grow, and are not in it.", blocks
    )
    yield _counter(name, "writes", "Captured writes, from the set's first on.", status.durable_write)


def _of_store(name: str, intervals: list[Interval], status: EngineStatus | None) -> Iterator[Metric]:
    lacking = sum(1 for each in intervals if each.outside)
    stored = sum(sum(each.stored.values()) for each in intervals)
    yield _gauge(name, "intervals", "Intervals in the store.", len(intervals))
    yield _gauge(name, "incomplete_intervals", "Intervals that lack data which lay outside of the set.", lacking)
    gaps = sum(len(each.gaps) for each in intervals) + (1 if status is not None and status.tracked is not None else 0)
    yield _gauge(name, "gaps", "Gaps in the store's intervals, and one that goes on: no point is in them.", gaps)
    yield _gauge(name, "store_bytes", "Bytes of the intervals in the store, without its image.", stored)


def _damages(name: str, scrub: Record) -> Metric:
    found = len(scrub.damages)
    return _gauge(name, "damages", "Damages in the store's parts when they were read last.", found)


def _of_times(name: str, numbers: Numbers, stored: Stored | None) -> Iterator[Metric]:
    """Points in time as timestamps, and how long ago things were. What is not known is not told."""
    now = time.time()
    if stored is not None and stored.oldest_ns is not None:
        oldest = stored.oldest_ns / 1e9
        yield _gauge(name, "oldest_recoverable_timestamp_seconds", "The oldest point that can be restored.", oldest)
    if numbers.newest_write_ns is not None and numbers.newest_boundary_ns is not None:
        tracked = None if numbers.status is None else numbers.status.tracked
        since_ns = numbers.newest_write_ns if tracked is None else tracked.since_ns  # what comes then is in no point
        newest = min(numbers.newest_write_ns, since_ns) / 1e9
        yield _gauge(name, "newest_recoverable_timestamp_seconds", "The newest point that can be restored.", newest)
    if numbers.newest_boundary_ns is not None:
        lag = max(0.0, now - numbers.newest_boundary_ns / 1e9)
        yield _gauge(name, "lag_seconds", "How far the store is behind.", lag)
    if numbers.stored_write is not None:
        yield _counter(name, "stored_writes", "Captured writes that the store holds.", numbers.stored_write)
    ages = {
        "cut": _age(now, numbers.newest_boundary_ns),
        "look": numbers.look_seconds,
        "verified": _age(now, None if stored is None else stored.verified_ns),
        "scrub": _age(now, None if stored is None else stored.scrub.whole or None),
    }
    for what, age in ages.items():
        if age is not None:
            yield _gauge(name, f"last_{what}_age_seconds", f"Seconds since {AGES[what]}.", age)


def _age(now: float, time_ns: int | None) -> float | None:
    return None if time_ns is None else max(0.0, now - time_ns / 1e9)


def registry(config: Config, numbers: Callable[[], Numbers]) -> CollectorRegistry:
    """One with these metrics and nothing else: not those of the Python process."""
    found = CollectorRegistry(auto_describe=False)
    found.register(SetCollector(config, numbers))
    return found
