"""Bytes that look like WAL, or like a filesystem's log, never crash the reader nor make it contradict itself.

libFuzzer with address sanitizer.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import zstandard

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "fuzz" / "corpus"


@pytest.fixture(scope="module", params=["wal", "logs"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fuzz target."""
    program = tmp_path_factory.mktemp("fuzz") / f"fuzz_{request.param}"
    subprocess.run([str(ROOT / "script" / "fuzz-build"), str(program), program.name], check=True)
    return program


def seeds(target: Path, place: Path) -> Path:
    """A target's corpus with each set of flags that it knows."""
    place.mkdir()
    logs = {"xfs": (2,), "ext4": (1,)}
    for file in CORPUS.glob("*.zst"):
        if (file.stem in logs) != (target.name == "fuzz_logs"):
            continue
        raw = zstandard.ZstdDecompressor().decompress(file.read_bytes())
        for flags in logs.get(file.stem, (0, 1, 3, 5)):
            (place / f"{file.stem}-{flags}").write_bytes(bytes([flags]) + raw[1:])
    return place


def test_the_seeds_reach_what_is_read(target: Path, tmp_path: Path) -> None:
    """Else the target would prove nothing: it finds the transactions of make_corpus.WORK, or a file in the log."""
    for seed in seeds(target, tmp_path / "seeds").iterdir():
        environment = {**os.environ, "FUZZ_WAL_TELL": "1", "FUZZ_LOGS_TELL": "1"}
        done = subprocess.run(
            [str(target), "-runs=1", str(seed)], check=False, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        if target.name == "fuzz_wal":
            ends = [int(line.split(":")[1]) for line in done.stderr.splitlines() if line.startswith("ends of")]
            assert max(ends) >= 12, seed
        else:
            pages = 12 if seed.name.startswith("xfs") else 4
            assert f"files: {pages} waited: {pages}" in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("seconds", [15, pytest.param(600, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_fuzzing_finds_nothing(target: Path, tmp_path: Path, seconds: int) -> None:
    found = tmp_path / "found"
    found.mkdir()
    # Memory is judged by what is in use, in the targets: the resident size that libFuzzer would judge by starts, after
    # an exec, with the largest that this process of pytest ever had.
    words = [str(target), f"-max_total_time={seconds}", "-max_len=130000", "-timeout=60"]
    words += ["-rss_limit_mb=0", "-malloc_limit_mb=256"]
    words += [f"-artifact_prefix={tmp_path}/", str(found), str(seeds(target, tmp_path / "seeds"))]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done " in done.stderr
