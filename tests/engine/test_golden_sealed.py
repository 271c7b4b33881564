"""The engine reads the golden files of an encrypted store as tests/unit/test_golden_sealed.py does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pgcdp.postgres.wal import Manager, read_notes
from tests.golden import make_golden as golden

SEALED = Path(golden.__file__).resolve().with_name("sealed")
EXPECTED = json.loads((SEALED / "expected.json").read_text("utf-8"))


def read_wal(program: Path, out: Path, key: bytes) -> subprocess.CompletedProcess[str]:
    """`pgcdp-engine wal` of the golden interval, with a data key through a pipe."""
    out.mkdir()
    reading, writing = os.pipe()
    try:
        os.write(writing, key)
        os.close(writing)
        words = ["--system-identifier", "1", "--segment-bytes", str(16 << 20), "--key-fd", str(reading)]
        return subprocess.run(
            [str(program), "wal", *words, "--out", str(out), str(SEALED / "0000000003")],
            capture_output=True, text=True, timeout=60, check=False, pass_fds=[reading],
        )  # fmt: skip
    finally:
        os.close(reading)


def test_a_mark_is_found_in_sealed_frames(engine_program: Path, tmp_path: Path) -> None:
    done = read_wal(engine_program, tmp_path / "out", bytes.fromhex(EXPECTED["data_key"]))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"write": 3}
    (mark,) = [note for note in read_notes((tmp_path / "out" / "notes").read_bytes()) if note.rmid == Manager.MARK]
    assert mark.write == EXPECTED["mark"]["write"]
    assert mark.body.decode() == EXPECTED["mark"]["name"]


@pytest.mark.parametrize("key", ["user_key", "set_id"])
def test_another_key_finds_damage_and_nothing_else(engine_program: Path, tmp_path: Path, key: str) -> None:
    wrong = (bytes.fromhex(EXPECTED[key]) * 2)[:32]
    done = read_wal(engine_program, tmp_path / "out", wrong)
    assert done.returncode == 5, done.stdout
    assert str(SEALED / "0000000003") in done.stderr
