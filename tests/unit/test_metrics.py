"""Metrics: what is not known is left out, what lies in a store that is gone is no longer told, names are documented."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pgcdp.capture.control import Tracked, parse_status
from pgcdp.records import Boundary, Gap, Interval, Volume
from pgcdp.serving import metrics
from pgcdp.serving.metrics import Numbers, registry
from pgcdp.store.damage import Damage
from pgcdp.store.layout import Store
from pgcdp.store.scrub_record import Record, write_record
from tests.unit.test_config import sample

ROOT = Path(__file__).resolve().parents[2]
GAP = Gap(3, 5, "changed", 0, 10, 2)
SET_ID = bytes(range(16))
STATUS = parse_status(
    {
        "state": "stalled", "pid": 1, "last_write": 9, "durable_write": 8, "applied_write": 7, "synced_write": 7,
        "released_write": 5, "batch": 3, "position": {"segment": 1, "offset": 4096}, "volumes": [], "rss_kib": 1,
        "journal": {"bytes": 4096, "limit": 1 << 30, "segments": 1, "segment_bytes": 64 << 20},
        "errors": ["journal: no"],
    }
)  # fmt: skip


def read(numbers: Numbers, place: Path) -> dict[str, float]:
    config = sample(store=place / "store", journal=place, volumes=())
    text = generate_latest(registry(config, lambda: numbers)).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            assert each.labels["set"] == "main"
            rest = [value for name, value in sorted(each.labels.items()) if name not in ("set", "version")]
            found["/".join([each.name, *rest])] = each.value
    return found


def numbers(store: Store | None = None, **changes: object) -> Numbers:
    nothing: dict[str, object] = {
        "status": None, "store": store, "error": None, "errors_total": 0, "newest_boundary_ns": None,
        "newest_write_ns": None, "stored_write": None, "look_seconds": None, "rates": {},
    }  # fmt: skip
    return Numbers(**{**nothing, **changes})  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(tmp_path / "store", "main", SET_ID, [Volume(0, "data", 1 << 20)])
    return made.with_baseline(Boundary(0, 4, 1_700_000_000 * 10**9, 1, 1, 1, 1, "baseline"))


def test_an_agent_that_knows_nothing_tells_no_number_that_could_be_taken_for_one(tmp_path: Path) -> None:
    found = read(numbers(error="no engine answers", errors_total=1), tmp_path)
    assert {name for name in found if not name.startswith("pgcdp_state/")} == {
        "pgcdp_agent_info", "pgcdp_problems", "pgcdp_errors_total",
    }  # fmt: skip
    assert found["pgcdp_state/stopped"] == 1
    assert found["pgcdp_problems"] == 1


def test_what_the_engine_says_is_told(tmp_path: Path) -> None:
    found = read(numbers(status=STATUS, error="x"), tmp_path)
    assert [found[f"pgcdp_state/{each}"] for each in metrics.STATES] == [0, 0, 1, 0]
    assert found["pgcdp_problems"] == 2
    assert (found["pgcdp_journal_bytes"], found["pgcdp_journal_limit_bytes"]) == (4096, 1 << 30)
    assert found["pgcdp_writes_total"] == 8


def test_numbers_of_a_store_that_is_gone_are_not_told_any_more(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "STORE_SECONDS", 0.0)
    now = numbers(store, newest_boundary_ns=1_700_000_000 * 10**9, newest_write_ns=1_700_000_100 * 10**9)
    config = sample(store=store.path, journal=tmp_path, volumes=())
    scraped = registry(config, lambda: now)
    before = generate_latest(scraped).decode()
    assert 'pgcdp_oldest_recoverable_timestamp_seconds{set="main"} 1.7e+09' in before
    assert 'pgcdp_intervals{set="main"} 0.0' in before
    shutil.rmtree(store.path)
    after = generate_latest(scraped).decode()
    assert "pgcdp_newest_recoverable_timestamp_seconds" in after
    assert "pgcdp_oldest" not in after
    assert "pgcdp_intervals" not in after


def test_the_age_of_the_last_whole_scrub_and_what_it_found(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is under way, or was killed, does not count: parts that it has not come to may be as old as ever."""
    monkeypatch.setattr(metrics, "STORE_SECONDS", 0.0)
    assert "pgcdp_last_scrub_age_seconds" not in read(numbers(store), tmp_path), "nothing was read yet"
    began = time.time_ns() - 3600 * 10**9
    gone = Damage(store.path / "image" / "data.img", 4096, "its checksum is wrong", "nothing is lost")
    whole = Record("agent", began, began + 10**9, began, damages=(gone,))
    for each in (whole, replace(whole, began=time.time_ns(), ended=0)):
        write_record(store, each)
        found = read(numbers(store), tmp_path)
        assert found["pgcdp_last_scrub_age_seconds"] == pytest.approx(3600, abs=60)
        assert found["pgcdp_damages"] == 1


def test_a_gap_that_goes_on_is_counted_and_no_point_is_told_of_in_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "STORE_SECONDS", 0.0)
    for healing in (False, True):
        status = replace(STATUS, tracked=Tracked(7, 100 * 10**9, 12, healing))
        told = read(numbers(store, status=status, newest_boundary_ns=90 * 10**9, newest_write_ns=130 * 10**9), tmp_path)
        assert (told["pgcdp_gaps"], told["pgcdp_tracked_blocks"]) == (1, 12)
        assert told["pgcdp_newest_recoverable_timestamp_seconds"] == 100
    told = read(numbers(store, status=STATUS, newest_boundary_ns=90 * 10**9, newest_write_ns=130 * 10**9), tmp_path)
    assert (told["pgcdp_gaps"], told["pgcdp_tracked_blocks"]) == (0, 0)
    assert told["pgcdp_newest_recoverable_timestamp_seconds"] == 130


def test_every_metric_is_documented(store: Store, tmp_path: Path) -> None:
    told = read(
        numbers(
            store, status=STATUS, newest_boundary_ns=10**18, newest_write_ns=10**18, stored_write=4, look_seconds=3.0,
            rates={"journal": {"bytes_per_second": 10.0, "over_seconds": 600.0}, "volumes": {}},
        ),
        tmp_path,
    )  # fmt: skip
    text = (ROOT / "docs/operations.md").read_text("utf-8")
    documented = set(re.findall(r"`(pgcdp_[a-z_]+)`", text))
    names = {name.partition("/")[0] for name in told} | {
        "pgcdp_last_verified_age_seconds",
        "pgcdp_last_scrub_age_seconds",
    }
    assert names == documented - {"pgcdp_state"} | {"pgcdp_state"}


def test_gaps_and_what_is_incomplete_are_counted() -> None:
    boundary = Boundary(1, 9, 10, 1, 1, 1, 1, "requested")
    whole = Interval(1, 1, 9, 0, 10, boundary, 9, 9, 9, {"writes": 5, "index": 2}, outside=())
    torn = whole._replace(number=2, gaps=(GAP, GAP), outside=(("pg_tblspc/1", "/x"),))
    told = {each.name: each.samples[0].value for each in metrics._of_store("main", [whole, torn], STATUS)}
    assert told == {
        "pgcdp_intervals": 2, "pgcdp_gaps": 2, "pgcdp_incomplete_intervals": 1, "pgcdp_store_bytes": 14,
    }  # fmt: skip
