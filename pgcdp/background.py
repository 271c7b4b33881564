"""What makes a process a good neighbour of production: it gives way, and it does not wear out the kernel.

The reasons and what was measured: docs/decisions/2026-11-22-giving-way.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
from collections import defaultdict
from contextlib import suppress

NICE = 10

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

# linux/ioprio.h
_SYS_IOPRIO_SET = defaultdict(lambda: 30, {"x86_64": 251})  # the generic number elsewhere
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13

# linux/prctl.h
_PR_SET_PDEATHSIG = 1

KEPT_BYTES = 128 << 20
"""Freed memory up to this is not given back to the kernel."""


def give_way() -> None:
    """Let production's own work go first, and do not interrupt it."""
    os.nice(NICE)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def give_way_wholly() -> None:
    """For a thread: it runs, and reads from disks, when nobody else wants to."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, 19)
        ctypes.CDLL(None).syscall(_SYS_IOPRIO_SET[platform.machine()], _IOPRIO_WHO_PROCESS, thread, _IOPRIO_IDLE)


def end_with(parent: int) -> None:
    """Get SIGTERM when the thread of process `parent` ends that started this one, or now, when it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def keep_freed_memory() -> None:
    """Take the next buffer from what was freed, not from the kernel.

    Buffers of some hundred KiB to some MiB come and go all the time here; glibc would map each anew, and the kernel
    clear each of its pages: that was a fifth of the agent's time. Other C libraries do as they like.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
