"""The door that Prometheus scrapes at: a wrong address, one that is taken, and what a killed agent left."""

from __future__ import annotations

import http.client
import socket
import stat
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from pgcdp.errors import PreconditionError
from pgcdp.metrics_address import Address, parse_address
from pgcdp.serving import metrics_door
from pgcdp.serving.metrics_door import MetricsDoor, MetricsService


@pytest.fixture
def registry() -> CollectorRegistry:
    found = CollectorRegistry()
    Gauge("answer", "The answer.", registry=found).set(42)
    return found


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def value(text: str) -> float:
    return next(each.samples[0].value for each in text_string_to_metric_families(text) if each.name == "answer")


def read(port: int, host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=60) as reply:
        return str(reply.read().decode())


def read_socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(60)
        door.connect(str(path))
        door.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        reply = http.client.HTTPResponse(door)
        reply.begin()
        return reply.read().decode()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("off", None),
        ("127.0.0.1:9187", Address("127.0.0.1", 9187)),
        ("localhost:9187", Address("127.0.0.1", 9187)),
        ("[::1]:9187", Address("::1", 9187)),
        ("0.0.0.0:1", Address("0.0.0.0", 1)),
        ("/run/pgcdp/metrics.sock", Address(path=Path("/run/pgcdp/metrics.sock"))),
    ],
)
def test_addresses_that_are_right(text: str, address: Address | None) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "9187", ":9187", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:99999", "::1:9187",
     "db.example:9187", "256.0.0.1:9187", "127.0.0.1:9187/metrics", "http://127.0.0.1:9187", "run/x.sock", "/run/x/",
     "/" + "x" * 107, "127.0.0.1:+9", "127.0.0.1:٣"],
)  # fmt: skip
def test_addresses_that_are_wrong(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_address(text)


def test_a_port_is_scraped(registry: CollectorRegistry) -> None:
    port = free_port()
    door = MetricsDoor(Address("127.0.0.1", port), registry)
    door.open()
    try:
        assert value(read(port)) == 42
    finally:
        door.close()
    with pytest.raises(OSError):  # noqa: PT011
        read(port)


def test_a_socket_is_scraped_and_is_for_its_owner_alone(registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    door = MetricsDoor(Address(path=path), registry)
    door.open()
    try:
        assert value(read_socket(path)) == 42
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        door.close()
    assert not path.exists()


def test_who_sends_nothing_does_not_keep_others_out(registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    door = MetricsDoor(Address(path=path), registry)
    door.open()
    try:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(path))
            assert value(read_socket(path)) == 42
    finally:
        door.close()


def test_a_port_that_is_taken_is_an_error_that_names_it(registry: CollectorRegistry, taken: int) -> None:
    door = MetricsDoor(Address("127.0.0.1", taken), registry)
    with pytest.raises(PreconditionError, match=f"127.0.0.1:{taken}: Address already in use"):
        door.open()
    assert not door.is_open


def test_what_a_killed_agent_left_is_taken_away(registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    door = MetricsDoor(Address(path=path), registry)
    door.open()
    try:
        assert value(read_socket(path)) == 42
    finally:
        door.close()


def test_a_socket_that_somebody_answers_at_is_not_taken_away(registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    one, other = MetricsDoor(Address(path=path), registry), MetricsDoor(Address(path=path), registry)
    one.open()
    try:
        with pytest.raises(PreconditionError, match="already in use"):
            other.open()
        assert value(read_socket(path)) == 42
    finally:
        one.close()


def test_a_file_that_is_no_socket_stays(registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(PreconditionError, match="no socket"):
        MetricsDoor(Address(path=path), registry).open()
    assert path.read_text() == "data"


def test_the_service_says_what_keeps_it_shut_and_opens_when_that_is_gone(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_door, "RETRY_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        service = MetricsService(f"127.0.0.1:{port}", registry)
        service.keep_open()
        assert str(port) in str(service.told()["error"])
    try:
        service.keep_open()
        assert service.told() == {"listen": f"127.0.0.1:{port}", "error": None}
        assert value(read(port)) == 42
    finally:
        with suppress(OSError):
            service.close()


def test_off_opens_nothing(registry: CollectorRegistry) -> None:
    service = MetricsService("off", registry)
    service.keep_open()
    assert service.told() == {"listen": "off", "error": None}
    service.close()
