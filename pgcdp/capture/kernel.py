"""What pgcdp needs of the kernel: whether it is there, and what is missing without it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pgcdp.capture import volumes
from pgcdp.records import Remark

NODES = (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop"))
LEAST = (5, 4)
"""Below that nothing was ever tried: io priorities, FUSE limits and loop ioctls are others."""
NEWER: tuple[tuple[tuple[int, int], str, str], ...] = (
    ((6, 9), "handing over requests (FUSE_NOTIFY_RESEND)",
     "when the capture process dies, the filesystem above sees I/O errors and Postgres panics; pgcdp up recovers it"),
    ((6, 12), "scopes of Landlock",
     "a process in a clone can send signals to production's Postgres, whose user it is"),
)  # fmt: skip
"""(version, what came with it, what is missing before)."""


def version_of(release: str) -> tuple[int, int]:
    """(6, 1) of "6.1.0-18-amd64". Raises ValueError."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None:
        raise ValueError(release)
    return int(match[1]), int(match[2])


def release_remarks(release: str) -> Iterator[Remark]:
    """What the kernel's version tells."""
    name = "kernel"
    try:
        version = version_of(release)
    except ValueError:
        yield Remark(
            name, "warning", f"{release} is no version that is known", "look whether FUSE and loop devices work"
        )
        return
    if version < LEAST:
        least = ".".join(map(str, LEAST))
        yield Remark(
            name, "failure", f"Linux {release} is older than {least}", f"use Linux {least} or newer, best 6.12"
        )
        return
    lacking = [(since, what, meaning) for since, what, meaning in NEWER if version < since]
    for since, what, meaning in lacking:
        newer = ".".join(map(str, since))
        yield Remark(
            name, "warning", f"Linux {release} lacks {what}: {meaning}", f"Linux {newer} or newer has it"
        )  # fmt: skip
    if not lacking:
        yield Remark(name, "ok", f"Linux {release}")


def doors() -> Iterator[Remark]:
    """FUSE and loop devices."""
    for node, module in NODES:
        try:
            os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            yield Remark(
                node, "failure", f"cannot be opened: {error.strerror}; capture needs it",
                f"modprobe {module}; in a container, pass {node} in",
            )  # fmt: skip
        else:
            yield Remark(node, "ok", "can be opened")


def direct(places: Mapping[str, Path]) -> Iterator[Remark]:
    """Whether files there can be written past the page cache, as the journal is, and must be to be durable in order.

    An unnamed file is made and gone at once. `places` are directories by what lies there.
    """
    name = "direct I/O"
    refused = {}
    for what, place in places.items():
        why = _refuses_direct(place)
        if why is not None:
            refused[what] = why
    for what, why in refused.items():
        yield Remark(
            name, "failure", f"the filesystem of the {what} in {places[what]} does not do it: {why}",
            f"put the {what} on a disk with ext4, xfs or btrfs",
        )  # fmt: skip
    if not refused:
        yield Remark(name, "ok", f"works for the {' and the '.join(places)}")


def _refuses_direct(place: Path) -> str | None:
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        os.close(os.open(place, flags | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return "it refuses O_DIRECT"
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            return None  # it has no unnamed files: not known
        return error.strerror or str(error)
    return None


def loops(fuse: Path) -> Iterator[Remark]:
    """The loop devices over the captured volumes: past the page cache, and without a write cache of their own."""
    name = "loop devices"
    wrong = []
    found = volumes.loops_over(fuse)
    for device in found:
        node = Path("/sys/block") / device.name
        with suppress(OSError):
            if (node / "loop/dio").read_text().strip() != "1":
                wrong.append(f"{device} goes through the page cache")
            if (node / "queue/write_cache").read_text().strip() != "write through":
                wrong.append(f"{device} sends flushes")
    if wrong:
        yield Remark(
            name, "failure", f"{'; '.join(wrong)}: what is answered is slower or later than capture means it",
            "pgcdp down and pgcdp up attach them anew",
        )  # fmt: skip
    elif found:
        yield Remark(name, "ok", f"{len(found)} with direct I/O, write through")
