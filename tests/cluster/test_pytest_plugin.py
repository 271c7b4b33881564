"""The fixtures as a project of somebody else uses them: what one test does is not there in the next."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fix_postgres import BindirOf

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "pytest.md"


def example() -> str:
    """The worked example of the documentation."""
    (found,) = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), flags=re.S)
    return str(found)


def run_pytest(place: Path, *words: str) -> str:
    """What pytest says below `place`, in whose directory nothing of this run's settings holds."""
    before = set(Path("/var/tmp").glob("pgcdp-pytest-*"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(Path("/var/tmp").glob("pgcdp-pytest-*")) == before
    return done.stdout


VERSION = """
import psycopg

def test_version(pgcdp_cluster):
    with psycopg.connect(pgcdp_cluster.dsn()) as connection:
        (found,) = connection.execute("show server_version").fetchone()
        assert found.split(".")[0] == "{major}"
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("by", ["option", "ini file"])
def test_the_executables_are_those_of_pytest_postgresql(tmp_path: Path, binaries_of: BindirOf, by: str) -> None:
    """A project that has chosen a version is not given another one in silence."""
    binaries = binaries_of(17)
    executable = str(binaries.path("pg_ctl"))
    (tmp_path / "test_version.py").write_text(VERSION.format(major=binaries.major))
    chosen = f"postgresql_exec = {executable}\n" if by == "ini file" else ""
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npgcdp_size = 512M\n{chosen}")
    run_pytest(tmp_path, *([f"--postgresql-exec={executable}"] if by == "option" else []), "test_version.py")


@pytest.mark.timeout(600)
def test_the_documented_example_passes_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_shop.py").write_text(example())
    (tmp_path / "pytest.ini").write_text("[pytest]\npgcdp_size = 512M\npgcdp_settings =\n    work_mem = 5MB\n")
    told = run_pytest(tmp_path, "test_shop.py")
    assert re.search(r"\b4 passed\b", told), told
