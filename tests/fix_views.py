"""The real engine showing a map: `show_map(view_map)` gives a `ShownView`, whose files can be read and written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pgcdp.capture.control import EngineBusy, EngineClient, EngineGone
from pgcdp.recovery.mapfile import ViewMap, encode
from pgcdp.sealing import data_key_of
from tests.fix_engine import _is_mounted
from tests.waiting import wait_until


@dataclass
class ShownView:
    """One view process over a map of its own below `root`."""

    program: Path
    root: Path
    options: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    key: bytes | None = None  # the data key of an encrypted store
    inherited: int | None = None
    """A descriptor that the process gets, too."""

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        self.fuse = self.root / "fuse"
        self.fuse.mkdir()
        self.map_file = self.root / "map"
        self.log = self.root / "view.log"
        self.client = EngineClient(self.root / "control")

    def command(self) -> list[str]:
        return [
            str(self.program),
            "view",
            f"--map={self.map_file}",
            f"--fuse={self.fuse}",
            f"--control={self.client.control}",
            f"--overlay={self.root}",
            *self.options,
        ]

    def start(self) -> None:
        """Starts the process and waits until it serves. RuntimeError if it ends."""
        theirs, ours = os.pipe()
        with self.log.open("ab") as log, open(theirs) as pipe:
            with open(ours, "wb") as key:
                key.write(self.key or b"")
            files = [each for each in (self.inherited, pipe.fileno() if self.key else None) if each is not None]
            words = [*self.command(), *([f"--key-fd={pipe.fileno()}"] if self.key else [])]
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=files)
        wait_until(self._serves, timeout=60, what="the view")

    def _serves(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError(f"the view ended with {self.process.returncode}: {self.text()[-2000:]}")
        return self.client.alive()

    def refused(self) -> tuple[int, str]:
        """Exit code and stderr of a start that should not succeed."""
        done = subprocess.run(self.command(), capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def status(self) -> dict[str, Any]:
        return self.client.request("status")

    def device(self, name: str) -> Path:
        return self.fuse / name

    def stop(self) -> int:
        """Stops by its control socket; the exit code."""
        assert self.process is not None

        def stopped() -> bool:
            try:
                self.client.request("stop")
            except EngineGone:
                return True
            except EngineBusy:  # the kernel tells of a closed file a moment later
                return False
            return True

        wait_until(stopped, what="stop")
        return self.ended()

    def ended(self) -> int:
        """Waits for its end; the exit code."""
        assert self.process is not None
        code = self.process.wait(timeout=60)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process = None
        return code

    def kill(self) -> None:
        """kill -9, and the dead mount goes."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.ended()
        while _is_mounted(self.fuse):
            subprocess.run(["umount", "-l", str(self.fuse)], check=True, capture_output=True)

    def complaints(self) -> list[str]:
        suspicious = re.compile(r"\b(warn|warning|error|ERROR|runtime error|assert\w*)\b")
        return [
            line
            for line in self.text().splitlines()
            if suspicious.search(line) and not any(re.search(pattern, line) for pattern in self.allowed)
        ]


ShowMap = Callable[..., ShownView]


@pytest.fixture
def show_map(engine_program: Path, scratch: Path) -> Iterator[ShowMap]:
    """show_map(view_map, *options, start=True, allowed=[...])"""
    made: list[ShownView] = []

    def show(view_map: ViewMap, *options: str, start: bool = True, allowed: list[str] | None = None) -> ShownView:
        view = ShownView(engine_program, scratch / f"view{len(made)}", list(options), allowed or [])
        made.append(view)
        view.key = data_key_of(view_map.sources[0].path.parent.parent)
        view.map_file.write_bytes(encode(view_map))
        if start:
            view.start()
        return view

    yield show
    for view in made:
        view.kill()
    complaints = [line for view in made for line in view.complaints()]
    assert complaints == [], "in the log of a view"


def waits_for_fuse(pid: int) -> bool:
    """Whether a thread of that process waits for the answer of a FUSE server, which its image comes from."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            if "request_wait_answer" in (task / "wchan").read_text():
                return True
    return False
