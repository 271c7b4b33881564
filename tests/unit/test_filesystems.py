"""Filesystems as `protect` makes them, told by their own tools."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pgcdp.capture import volumes


def log_bytes(path: Path, fs: str, size: int) -> int:
    """Of a filesystem made in a sparse file of that size."""
    path.touch()
    os.truncate(path, size)
    volumes.make_filesystem(path, fs, 0, 0, zeroed=True)
    words = ["dumpe2fs", "-h"] if fs == "ext4" else ["xfs_db", "-r", "-c", "sb 0", "-c", "print logblocks"]
    told = subprocess.run([*words, os.fspath(path)], check=True, capture_output=True, text=True).stdout
    path.unlink()
    (blocks,) = re.findall(r"Total journal blocks: +(\d+)" if fs == "ext4" else r"logblocks = (\d+)", told)
    return int(blocks) * 4096


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_a_large_volume_takes_no_longer_to_mount_after_a_crash(tmp_path: Path, fs: str) -> None:
    """What a mount reads first is the log, in every clone: one size of it, whatever the volume's."""
    assert {log_bytes(tmp_path / fs, fs, gib << 30) for gib in (2, 40, 300)} == {volumes.LOG_BYTES}


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_the_smallest_volume_can_be_made(tmp_path: Path, fs: str) -> None:
    assert 0 < log_bytes(tmp_path / fs, fs, volumes.LEAST_BYTES[fs]) <= volumes.LOG_BYTES
