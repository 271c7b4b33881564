"""Machines whose power can be cut: `make_machine(Disk(...), ...)` gives disks with a volatile write cache, mounted.

The disks are files that tests/power/power_disk.c serves, under loop devices in write-back mode. `cut` takes the power
from all of them at one moment. What ran on the machine is then ended and unmounted (`off`), and `on` starts the disks
anew with what had reached them.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pgcdp.capture import volumes
from pgcdp.errors import PreconditionError
from tests.failing_disks import unmount
from tests.fix_engine import ROOT
from tests.scratch import scratch_directory

FS_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: the filesystem gives up at once, without writing its log."""
NO_LOG_FLUSH = 2
REPLY_SECONDS = 120.0


@dataclass(frozen=True)
class Disk:
    """One disk: mounted at `Machine.place(name)`, or with `fs` None a bare device at `Machine.device(name)`."""

    name: str
    size: int
    fs: str | None = "ext4"


class Machine:
    """Disks below `root` that lose their power together.

    `tear`: bytes that a disk writes as a whole. xfs trusts in its sector, which is one of 4096 here; ext4 in 512.
    """

    def __init__(self, program: Path, root: Path, disks: tuple[Disk, ...], *, tear: int, cache: int) -> None:
        self.root = root
        self.disks = disks
        self._command = [str(program), f"--fuse={root / 'fuse'}", f"--tear={tear}", f"--cache={cache}"]
        self._command += [f"{disk.name}={root / 'backing' / disk.name}" for disk in disks]
        self._process: subprocess.Popen[bytes] | None = None
        self._cut = False

    def assemble(self) -> None:
        """New disks with fresh filesystems, mounted."""
        for directory in ("fuse", "backing", "dev"):
            (self.root / directory).mkdir(mode=0o700)
        for disk in self.disks:
            with self.backing(disk.name).open("wb") as file:
                file.truncate(disk.size)
        self._start()
        for disk in self.disks:
            if disk.fs is not None:
                self.place(disk.name).mkdir()
                volumes.make_filesystem(self.device(disk.name), disk.fs, 0, 0, zeroed=True)
        self._mount()

    @property
    def dead(self) -> bool:
        """Whether the power is gone, or may go at any moment."""
        return self._cut or self._process is None or self._process.poll() is not None

    def place(self, name: str) -> Path:
        """Where a disk is mounted."""
        return self.root / name

    def device(self, name: str) -> Path:
        """A name for the disk's loop device that stays when the power comes back."""
        return self.root / "dev" / name

    def served(self, name: str) -> Path:
        """The disk itself: the file under the loop device."""
        return self.root / "fuse" / name

    def backing(self, name: str) -> Path:
        """What is durable of a disk."""
        return self.root / "backing" / name

    def status(self) -> dict[str, dict[str, int]]:
        """For each disk: writes, syncs, unsynced, unsynced_bytes, evicted."""
        return self._ask("status")

    def cut(self, seed: int) -> dict[str, dict[str, int]]:
        """Cut the power now; when it returns, every request to the disks fails.

        Gives what became of each disk's unsynced writes: unsynced, and of these kept, torn, lost.
        """
        self._cut = True
        return self._ask(f"cut {seed}")

    def arm(self, seed: int, disk: str, syncs: int) -> None:
        """Cut the power in place of the n-th sync of a disk from now on: see `fallen`."""
        self._cut = True
        self._tell(f"cut {seed} {disk} {syncs}")

    def fallen(self) -> dict[str, dict[str, int]]:
        """Wait until the cut that was armed has come; as `cut`."""
        return self._reply()

    def off(self) -> None:
        """End everything that uses the disks, unmount, detach. Harmless when it is off."""
        self._end_users()
        for last in (False, False, True):  # the mount(2) of a process that was killed may end behind a look at them
            try:
                self._unmount_all()
                break
            except PreconditionError:
                if last:
                    raise
        if self._process is not None:
            self._process.communicate(timeout=60)  # it ends with its input
            code, self._process = self._process.returncode, None
            volumes.unmount_lazily(self.root / "fuse")  # nothing, unless it was killed
            assert code == 0, f"the power-cut device ended with {code}"

    def _unmount_all(self) -> None:
        """But the device's own mount, which ends with it. Raises PreconditionError when one has come meanwhile."""
        for mount in reversed(volumes.mounts_below(self.root)):
            if mount.fstype.startswith("fuse"):
                self._detach_all(mount.mountpoint)
                if mount.mountpoint != self.root / "fuse":
                    volumes.unmount_lazily(mount.mountpoint)
                continue
            with suppress(OSError):
                _give_up(mount.mountpoint)
            unmount(mount.mountpoint)
            volumes.detach_loop(Path(mount.source))

    def on(self) -> None:
        """The power is back: the disks with what is durable, their filesystems mounted."""
        self._start()
        self._cut = False
        self._mount()

    def _start(self) -> None:
        assert self._process is None
        # In a session of its own: whoever interrupts the tests must not take the disks away from what cleans up.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", start_new_session=True
        )
        self.status()
        for disk in self.disks:
            link = self.device(disk.name)
            link.unlink(missing_ok=True)
            link.symlink_to(volumes.attach_loop(self.served(disk.name)))

    def _mount(self) -> None:
        for disk in self.disks:
            if disk.fs is not None:
                volumes.mount(self.device(disk.name).readlink(), self.place(disk.name), disk.fs)

    def _ask(self, line: str) -> dict[str, dict[str, int]]:
        self._tell(line)
        return self._reply()

    def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def _reply(self) -> dict[str, dict[str, int]]:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], REPLY_SECONDS)[0]:
            raise TimeoutError("the power-cut device does not answer")
        line = self._process.stdout.readline()
        assert line, "the power-cut device has ended"
        reply: dict[str, Any] = json.loads(line)
        assert "error" not in reply, reply
        return reply

    def _end_users(self) -> None:
        """SIGKILL to all that has a file or its directory here, as if the machine were gone."""
        own = self._process.pid if self._process else 0
        while users := [pid for pid, _ in volumes.users_of(self.root) if pid != own]:
            ended = []
            for pid in users:
                with suppress(ProcessLookupError):
                    ended.append(os.pidfd_open(pid))
                    if volumes.uses(pid, self.root):  # still: by now the number could be another process's
                        signal.pidfd_send_signal(ended[-1], signal.SIGKILL)
            for end in ended:
                select.select([end], [], [], 60)
                os.close(end)

    def _detach_all(self, place: Path) -> None:
        for device in volumes.loops_over(place):
            volumes.detach_loop(device)


def _give_up(mountpoint: Path) -> None:
    directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(directory, FS_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(directory)


@pytest.fixture(scope="session")
def built_for_tests() -> Path:
    """The directory of what meson builds for tests only."""
    subprocess.run([str(ROOT / "script" / "engine-build"), "build-tests", "-Dtest_tools=true"], check=True)
    return ROOT / "build-tests"


MakeMachine = Callable[..., Machine]


@pytest.fixture
def make_machine(built_for_tests: Path) -> Iterator[MakeMachine]:
    """make_machine(Disk("system", 1 << 30), ..., tear=512, cache=256 << 20)"""
    made: list[Machine] = []

    def make(*disks: Disk, tear: int = 512, cache: int = 256 << 20) -> Machine:
        root = scratch_directory("power")
        machine = Machine(built_for_tests / "power-disk", root, disks, tear=tear, cache=cache)
        made.append(machine)
        machine.assemble()
        return machine

    yield make
    for machine in made:
        machine.off()
        shutil.rmtree(machine.root)
