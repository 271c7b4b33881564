"""The fixtures as a project of somebody else uses them: what one test does is not there in the next."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "pytest.md"


def example() -> str:
    """The worked example of the documentation."""
    (found,) = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), flags=re.S)
    return str(found)


@pytest.mark.timeout(600)
def test_the_documented_example_passes_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_shop.py").write_text(example())
    (tmp_path / "pytest.ini").write_text("[pytest]\npgcdp_size = 512M\npgcdp_settings =\n    work_mem = 5MB\n")
    before = set(Path("/var/tmp").glob("pgcdp-pytest-*"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    words = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", "test_shop.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b4 passed\b", done.stdout), done.stdout
    assert set(Path("/var/tmp").glob("pgcdp-pytest-*")) == before
