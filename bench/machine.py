"""What a measurement needs from the machine: processes, their cost, cgroups, loop devices."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def run(command: Sequence[str], user: str | None = None) -> str:
    """Run to the end and return stdout; raises with stderr when it fails."""
    done = subprocess.run(command, user=user, capture_output=True, text=True, cwd="/", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, and of its children that have ended (the agent's WAL reader)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / TICKS


def peak_rss_mib(pid: int) -> float:
    """Most resident memory that a process ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no peak memory of process {pid}")


def description() -> dict[str, object]:
    """The machine, for the results."""
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


class MemoryLimit:
    """A memory cgroup (v1 or v2) whose members may hold so many bytes, page cache included."""

    def __init__(self, name: str, limit: int) -> None:
        v1 = Path("/sys/fs/cgroup/memory")
        self._path = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / name
        self._path.mkdir()
        (self._path / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(limit))

    def add(self, pid: int) -> None:
        """Put a process in; its later children are in too."""
        (self._path / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Take it away; its processes have ended."""
        self._path.rmdir()


def attach(file: Path) -> str:
    """A loop device as pgcdp's own, over a plain file: direct I/O, 4096-byte sectors, flushes reach the file."""
    device = run(["losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", str(file)]).strip()
    Path(f"/sys/block/{Path(device).name}/queue/write_cache").write_text("write back")  # it outlives earlier users
    return device
