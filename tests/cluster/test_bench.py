"""`script/bench` in the small: what measures runs, and tells what it is asked for.

The full numbers are under bench/results/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.fix_engine import ROOT


def measured(name: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-P", str(ROOT / "bench" / "start.py"), name, *words, "--json"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PGCDP_", "PYTEST"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(900)
def test_clones_of_two_sizes_are_measured() -> None:
    """At a boundary that pgcdp cut. The others wait for a checkpoint that Postgres spreads over minutes."""
    asked = ("--gb", "0.1,0.4", "--rounds", "1", "--back", "2", "--boundary-only", "--no-pgbackrest")
    found = measured("clone", *asked)
    assert set(found["boundary_seconds"]) == {"0.1", "0.4"}
    for gb, seconds in found["boundary_seconds"].items():
        assert 0 < found["by_gb"][gb]["boundary"]["recovery_seconds"] < seconds < 30


@pytest.mark.timeout(900)
def test_a_rewind_is_measured() -> None:
    found = measured("rewind", "--gb", "0.1", "--seconds", "2", "--repeat", "1")["by_gb"]["0.1"]
    assert 0 < found["rewind"]["down_seconds"] < found["rewind"]["seconds"] < 120
