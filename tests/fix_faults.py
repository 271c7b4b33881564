"""Disks that fail where and when a test says: `faults`, `faulty_engine`; `failing` for calls of the test itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import sitecustomize
from tests.faults.service import Faults


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> Iterator[Faults]:
    """What is started from now on fails as this says, if it is built for it."""
    made = Faults(scratch / "faults")
    monkeypatch.setenv("PGCDP_TEST_FAULTS", str(made.directory))
    yield made
    made.clear_all()


@pytest.fixture(scope="session")
def faulty_engine(built_for_tests: Path) -> Path:
    """The engine with fault points."""
    return built_for_tests / "pgcdp-engine-with-faults"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Faults:
    """Faults of this process; nothing fails until one is set."""
    made = Faults(tmp_path / "faults")
    monkeypatch.setenv("PGCDP_TEST_FAULTS", str(made.directory))
    sitecustomize.install(monkeypatch.setattr)
    return made
