"""The real engine on fresh directories: `engine_program`, `scratch` and `make_capture`.

A test asks `make_capture()` for a `Capture`, starts it, writes to the files it serves, kills it, starts it again. At
the end everything is stopped, unmounted and removed, and a warning or error in the engine's log that the test did not
allow fails it.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.scratch import scratch_directory
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 4096
MIB = 1 << 20


def _plain_program() -> Path:
    """`PGCDP_ENGINE`, the build directory's, or the installed one."""
    named = os.environ.get("PGCDP_ENGINE")
    candidates = [Path(named)] if named else [ROOT / "build" / "pgcdp-engine", ROOT / "pgcdp" / "_bin" / "pgcdp-engine"]
    if not named:
        candidates += sorted((ROOT / "build").glob("*/pgcdp-engine"))
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"no engine at {', '.join(map(str, candidates))}: build it with meson or set PGCDP_ENGINE")


def _engine_builds() -> list[str]:
    return ["plain", "asan"] if os.environ.get("PGCDP_ENGINE_ASAN") else ["plain"]


@pytest.fixture(params=_engine_builds())
def engine_program(request: pytest.FixtureRequest) -> Path:
    """The engine; with `PGCDP_ENGINE_ASAN` each test runs a second time on that build."""
    return Path(os.environ["PGCDP_ENGINE_ASAN"]) if request.param == "asan" else _plain_program()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A fresh directory on a real filesystem (direct I/O, holes), gone afterwards."""
    path = scratch_directory("test")
    yield path
    shutil.rmtree(path)


@dataclass
class Capture:
    """One capture process over image files of its own. Sizes are bytes."""

    program: Path
    root: Path
    volumes: dict[str, int]
    segment_bytes: int = 8 * MIB
    journal_limit: int = 256 * MIB
    on_full: str = "stall"
    set_id: str = field(default_factory=lambda: secrets.token_hex(16))
    allowed: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def __post_init__(self) -> None:
        self.journal = self.root / "journal"
        self.fuse = self.root / "fuse"
        self.socket = self.root / "control"
        self.log = self.root / "engine.log"
        self.root.mkdir(parents=True)
        self.fuse.mkdir()
        for name, size in self.volumes.items():
            with self.backing(name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            shutil.copyfile(self.backing(name), self.baseline(name))

    def backing(self, name: str) -> Path:
        """The image file that stands for the production volume."""
        return self.root / f"{name}.backing"

    def baseline(self, name: str) -> Path:
        """What the volume held before the first write."""
        return self.root / f"{name}.baseline"

    def device(self, name: str) -> Path:
        """The file that the capture process serves for a volume."""
        return self.fuse / name

    def command(self, *, create: bool) -> list[str]:
        """The command line; the volume order is that of `volumes`."""
        return [
            str(self.program),
            "capture",
            f"--set-id={self.set_id}",
            f"--journal={self.journal}",
            *(["--create"] if create else []),
            f"--segment-bytes={self.segment_bytes}",
            f"--journal-limit={self.journal_limit}",
            f"--on-full={self.on_full}",
            f"--fuse={self.fuse}",
            f"--control={self.socket}",
            *self.more,
            *(f"{name}={self.backing(name)}" for name in self.volumes),
        ]

    def start(self) -> None:
        """Starts the process (the first time with --create) and waits until it serves. RuntimeError if it ends."""
        assert self.process is None
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(create=self.starts == 0), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.starts += 1
        wait_until(self._serves, timeout=60, what="capture")

    def wait_ready(self) -> None:
        """Until a new journal can take a mark: it is refused where the first segment takes longer than a second."""
        wait_until(lambda: any(self.journal.glob("*.seg")), what="the first segment")

    def _serves(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            code, self.process = self.process.returncode, None
            raise RuntimeError(f"engine ended with {code}: {self.log.read_text(errors='replace')[-2000:]}")
        with suppress(OSError, ValueError):
            self.status()
            return all(self.device(name).stat().st_size == size for name, size in self.volumes.items())
        return False

    def run_refused(self, *, create: bool = False) -> tuple[int, str]:
        """Exit code and stderr of a start that should not succeed."""
        done = subprocess.run(self.command(create=create), capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    def request(self, cmd: str, *, timeout: float = 60.0, **fields: Any) -> dict[str, Any]:
        """One request over the control socket, and its reply."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(str(self.socket))
            connection.sendall(json.dumps({"cmd": cmd, **fields}).encode() + b"\n")
            reply = b""
            while not reply.endswith(b"\n"):
                piece = connection.recv(65536)
                if not piece:
                    raise ConnectionResetError(errno.ECONNRESET, "the engine hung up")
                reply += piece
        answer = json.loads(reply)
        assert isinstance(answer, dict)
        return answer

    def status(self) -> dict[str, Any]:
        return self.request("status")

    def stop(self) -> int:
        """Stops cleanly; the exit code."""
        assert self.process is not None
        # The kernel tells the engine of a closed file a moment after close() has returned.
        wait_until(lambda: "error" not in self.request("stop"), what="stop")
        code = self.process.wait(timeout=60)
        self.process = None
        return code

    def kill(self) -> None:
        """kill -9, and the dead mount goes."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(timeout=60)
            self.process = None
        self.unmount()

    def unmount(self) -> None:
        """What is left of the FUSE mount goes, even when files in it are open."""
        while _is_mounted(self.fuse):
            subprocess.run(["umount", "-l", str(self.fuse)], check=True, capture_output=True)

    def engine(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs another sub-command on this journal, such as check or dump."""
        command = [str(self.program), arguments[0], f"--journal={self.journal}", *arguments[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def complaints(self) -> list[str]:
        """Lines of the log with a warning, an error or a sanitizer's report that the test did not allow."""
        if not self.log.exists():
            return []
        suspicious = re.compile(r"\b(warn|warning|error|ERROR|runtime error|assert\w*)\b")
        lines = self.log.read_text(errors="replace").splitlines()
        allowed = [*self.allowed, *LATE, *(() if _may_flush() else NOT_ALLOWED)]
        return [line for line in lines if suspicious.search(line) and not any(re.search(a, line) for a in allowed)]


LATE = ("the next segment of the journal is not ready yet: writes wait", "the journal has space again: writes go on")
"""What an engine says where a segment takes more than a second to be made: its disk is others', too."""
NOT_ALLOWED = ("cannot become an I/O flusher", "cannot leave the out-of-memory killer's list")
"""What an engine says where the machine does not let root do that."""


def _may_flush() -> bool:
    """Whether this machine lets root become an I/O flusher (CAP_SYS_RESOURCE; containers often do not)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) & 1 << 24)


def _is_mounted(point: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(point) for line in lines)


MakeCapture = Callable[..., Capture]


@pytest.fixture
def make_capture(engine_program: Path, scratch: Path) -> Iterator[MakeCapture]:
    """A function that makes a `Capture`: make_capture(volumes={"data": 8 << 20}, segment_bytes=..., ...)."""
    made: list[Capture] = []

    def make(volumes: dict[str, int] | None = None, **options: Any) -> Capture:
        capture = Capture(engine_program, scratch / f"set{len(made)}", volumes or {"data": 16 * MIB}, **options)
        made.append(capture)
        return capture

    yield make
    for capture in made:
        capture.kill()
    complaints = [line for capture in made for line in capture.complaints()]
    assert complaints == [], "in the engine's log"


class Direct:
    """A volume's file or device opened with O_DIRECT: whole blocks in, whole blocks out."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def write(self, offset: int, data: bytes) -> None:
        """Writes whole blocks; back only when the engine has answered."""
        with mmap.mmap(-1, len(data)) as memory:
            memory.write(data)
            done = os.pwrite(self.fd, memory, offset)
        if done != len(data):
            raise OSError(errno.EIO, f"{done} of {len(data)} bytes written at offset {offset}")

    def read(self, offset: int, length: int) -> bytes:
        with mmap.mmap(-1, length) as memory:
            done = os.preadv(self.fd, [memory], offset)
            return memory[:done]
