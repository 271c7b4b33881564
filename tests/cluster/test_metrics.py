"""The agent's metrics, as Prometheus reads them, say what `status` says; where they cannot be, capture goes on."""

from __future__ import annotations

import socket
import time
import urllib.request
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgcdp import api, config, service
from pgcdp.cli.main import main
from pgcdp.records import Target
from pgcdp.units import parse_time
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.waiting import wait_until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def listen(found: ProtectedSet, address: str) -> None:
    """Change the setting and start the agent anew."""
    service.stop(found.config)
    config.save_config(replace(found.config, metrics_listen=address))
    service.start(found.config)
    service.await_following(found.config.paths)


def samples(port: int) -> dict[tuple[str, str], float]:
    """Values by name and what tells them apart besides the set."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["set"] == "main", sample
            rest = [value for name, value in sample.labels.items() if name not in ("set", "version")]
            found[sample.name, "".join(rest)] = sample.value
    return found


@pytest.fixture
def shown(make_set: MakeSet, binaries_of: BindirOf) -> tuple[ProtectedSet, int]:
    found = make_set(binaries_of(17), allowed=[*KILLED, r"terminating connection due to unexpected postmaster exit"])
    port = free_port()
    listen(found, f"127.0.0.1:{port}")
    return found, port


def test_a_scrape_says_what_status_and_info_say(shown: tuple[ProtectedSet, int]) -> None:
    found, port = shown
    found.sql("create table t as select generate_series(1, 20000) as n")
    api.cut(found.name)
    found.sql("insert into t select generate_series(1, 1000)")

    def still() -> tuple[dict[str, Any], dict[tuple[str, str], float]] | None:
        """Status and metrics, between which nothing was written; the agent had taken all of it before."""
        before = api.status(found.name)
        now = samples(port)
        after = api.status(found.name)
        quiet = (
            before["durable_write"] == after["durable_write"] == now["pgcdp_writes_total", ""]
            and before["agent"]["taken_write"] == before["durable_write"]
        )
        return (after, now) if quiet else None

    told = wait_until(still, timeout=60, what="a quiet moment")
    assert told is not None
    (status, now), info = told, api.info(found.name)
    window = status["recovery_window"]
    assert now["pgcdp_oldest_recoverable_timestamp_seconds", ""] == pytest.approx(
        parse_time(window["from_time"]) / 1e9, abs=1e-5
    )
    assert now["pgcdp_newest_recoverable_timestamp_seconds", ""] == pytest.approx(
        parse_time(window["to_time"]) / 1e9, abs=1e-5
    )
    assert now["pgcdp_state", "capturing"] == 1
    assert sum(value for (name, _), value in now.items() if name == "pgcdp_state") == 1
    assert now["pgcdp_journal_limit_bytes", ""] == status["journal"]["limit"]
    assert 0 < now["pgcdp_journal_bytes", ""] <= status["journal"]["bytes"]
    assert now["pgcdp_stored_writes_total", ""] == status["stored_write"]
    assert now["pgcdp_lag_seconds", ""] == pytest.approx(status["lag_seconds"], abs=5)
    assert now["pgcdp_last_cut_age_seconds", ""] == now["pgcdp_lag_seconds", ""]
    assert 0 <= now["pgcdp_last_look_age_seconds", ""] < 120
    assert now["pgcdp_problems", ""] == 0
    assert now["pgcdp_incomplete_intervals", ""] == 0
    assert ("pgcdp_last_verified_age_seconds", "") not in now  # nothing was verified yet

    def mirrored() -> bool:
        seen = samples(port)
        stored = sum(sum(each["stored"].values()) for each in api.info(found.name)["intervals"])
        return seen["pgcdp_store_bytes", ""] == stored and seen["pgcdp_intervals", ""] == len(info["intervals"])

    wait_until(mirrored, timeout=60, what="the numbers of the store")
    assert api.verify(found.name, Target("newest"))["ok"]
    wait_until(lambda: ("pgcdp_last_verified_age_seconds", "") in samples(port), timeout=60, what="the verification")
    assert samples(port)["pgcdp_last_verified_age_seconds", ""] < 120


def test_capture_that_died_shows_as_stopped(shown: tuple[ProtectedSet, int]) -> None:
    found, port = shown
    found.kill_engine()
    wait_until(lambda: samples(port)["pgcdp_state", "stopped"] == 1, what="the state stopped")
    now = samples(port)
    assert now["pgcdp_state", "capturing"] == 0
    assert now["pgcdp_problems", ""] >= 1
    assert now["pgcdp_errors_total", ""] >= 1
    assert ("pgcdp_journal_bytes", "") not in now  # nobody knows
    api.up(found.name)
    wait_until(lambda: samples(port)["pgcdp_state", "capturing"] == 1, timeout=60, what="capture again")


def test_writes_that_wait_for_a_capture_process_are_one_state_for_status_and_metrics(
    shown: tuple[ProtectedSet, int],
) -> None:
    """No capture process can start, and the holder keeps the connection: nothing is stopped, and nothing goes on."""
    found, port = shown
    if found.status()["held"]["holder"] is None:
        pytest.skip("no holder here")
    found.allowed += [r"cannot open the journal's lock"]
    lock = found.config.journal / "lock"
    kept = lock.with_name("lock-away")
    lock.rename(kept)
    lock.mkdir()  # which no engine can open
    try:
        found.kill_capture()
        wait_until(lambda: samples(port)["pgcdp_state", "stalled"] == 1, timeout=60, what="the metrics say stalled")
        assert found.status()["state"] == "stalled"
        assert samples(port)["pgcdp_state", "stopped"] == 0
    finally:
        lock.rmdir()
        kept.rename(lock)
    wait_until(lambda: samples(port)["pgcdp_state", "capturing"] == 1, timeout=60, what="capture again")


def test_an_address_that_is_wrong_is_exit_2_and_one_that_is_taken_does_not_stop_capture(
    make_set: MakeSet, binaries_of: BindirOf, capsys: pytest.CaptureFixture[str]
) -> None:
    found = make_set(binaries_of(15), allowed=[r"metrics cannot be served at"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        listen(found, f"127.0.0.1:{port}")
        before = api.status(found.name)["intervals"]
        api.cut(found.name)
        assert api.status(found.name)["intervals"] == before + 1
        rows = [each for each in api.check(found.name)["checks"] if each["name"] == "metrics"]
        assert [each["ok"] for each in rows] == [False]
        assert f"127.0.0.1:{port}: Address already in use" in rows[0]["detail"]
    began = time.monotonic()
    wait_until(lambda: ("pgcdp_writes_total", "") in _try(port), timeout=90, what="another try")
    assert time.monotonic() - began < 75

    file = found.config.paths.config_file
    text = file.read_text()
    file.write_text(text.replace(f'"127.0.0.1:{port}"', '"db.example:http"'))
    try:
        assert main(["status", "main"]) == 2
    finally:
        file.write_text(text)
    said = capsys.readouterr().err
    assert "metrics_listen is 'db.example:http'" in said
    assert "127.0.0.1:PORT" in said


def _try(port: int) -> dict[tuple[str, str], float]:
    try:
        return samples(port)
    except OSError:
        return {}
