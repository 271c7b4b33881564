"""Faults in Python, as tests/faults/fault_points.h makes them in the engine: this directory stands on PYTHONPATH.

`PGCDP_TEST_FAULTS` names a directory; a file in it fails the point it is named like, or all points of a disk (see there
for what it says). A point is ROOM.FUNCTION.CALL: the innermost function of pgcdp, `pgcdp.fsio` left out, for which a
call changes a disk, such as `store.frames.FrameWriter.sync.fdatasync`. Rooms of the store, intervals and recovery,
and `twice`, belong to the disk `store`. `tests/faults/points.py` reads from the sources which there are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

DISK_ROOMS = ("store", "intervals", "recovery", "twice")
WRITES = ("pwrite", "write")
SYNCS = ("fsync", "fdatasync")
NAMES = ("rename", "replace", "ftruncate", "unlink", "mkdir", "posix_fallocate", "sendfile")
_lock = threading.RLock()
_real = {name: getattr(os, name) for name in (*WRITES, *SYNCS, *NAMES, "open", "close", "pread")}
_before: dict[tuple[int, int], list[tuple[int, bytes, int]]] = {}


def _point(call: str) -> str | None:
    """The name of the place that makes a call; None: nothing of pgcdp does."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("pgcdp.") and module not in ("pgcdp.fsio", "pgcdp.cli"):
            function = frame.f_code.co_qualname.replace(".<locals>", "").replace(".<lambda>", "")
            return f"{module.removeprefix('pgcdp.')}.{function}.{call}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _ask(call: str) -> str:
    """What shall go wrong with a call now: a KIND, or "" for nothing."""
    directory = os.environ.get("PGCDP_TEST_FAULTS")
    point = _point(call) if directory else None
    if directory is None or point is None:
        return ""
    names = [point, "store"] if point.split(".")[0] in DISK_ROOMS else [point]
    with _lock:
        for name in names:
            path = f"{directory}/{name}"
            try:
                fd = _real["open"](path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            words = os.read(fd, 128).decode().split()
            _real["close"](fd)
            kind, skip, times, ms = words[0], *(int(word) for word in [*words[1:], *("0", "1", "0")[len(words) - 1 :]])
            if skip > 0:
                _put_back(path, f"{kind} {skip - 1} {times} {ms}\n")
                return ""
            if kind == "short" and call not in WRITES:
                return ""
            _append(path + ".fired", f"{point} {kind}\n")
            if times == 1:
                with suppress(FileNotFoundError):  # the test has seen that it came, and takes it away
                    _real["unlink"](path)
            elif times > 1:
                _put_back(path, f"{kind} 0 {times - 1} {ms}\n")
            break
        else:
            return ""
    if kind == "slow":
        time.sleep(ms / 1000)
        return ""
    return kind


def _append(path: str, text: str) -> None:
    fd = _real["open"](path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    _real["write"](fd, text.encode())
    _real["close"](fd)


def _put_back(path: str, text: str) -> None:
    """As the test may take it away at any time, never made anew."""
    with suppress(FileNotFoundError):
        fd = _real["open"](path, os.O_WRONLY)
        _real["ftruncate"](fd, 0)
        _real["pwrite"](fd, text.encode(), 0)
        _real["close"](fd)


def _error(kind: str) -> OSError:
    code = errno.ENOSPC if kind == "enospc" else errno.EIO
    return OSError(code, os.strerror(code))


# --- what was there before a change that is not synced yet


def _file(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _keep(fd: int, offset: int, length: int) -> None:
    if not os.environ.get("PGCDP_TEST_FAULTS") or not stat.S_ISREG(os.fstat(fd).st_mode) or length > 64 << 20:
        return
    with suppress(OSError):
        reading = _real["open"](f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            old = _real["pread"](reading, length, offset)
        finally:
            _real["close"](reading)
        with _lock:
            _before.setdefault(_file(fd), []).append((offset, old, os.fstat(fd).st_size))


def _synced(fd: int) -> None:
    with _lock:
        _before.pop(_file(fd), None)


def _lose(fd: int) -> None:
    with _lock:
        changes = _before.pop(_file(fd), [])
    if not changes:
        return
    writing = _real["open"](f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        for offset, old, size in reversed(changes):
            _real["pwrite"](writing, old, offset)
            _real["ftruncate"](writing, size)
    finally:
        _real["close"](writing)


# --- the calls


def _pwrite(fd: int, data: Any, offset: int) -> int:
    kind = _ask("pwrite")
    with memoryview(data).cast("B") as view:  # let go of also by an error, whose frames would keep a caller's mmap open
        _keep(fd, offset, len(view))
        if not kind:
            return int(_real["pwrite"](fd, data, offset))
        half = len(view) // 2
        if half:
            _real["pwrite"](fd, view[:half], offset)
    if kind == "short" and half:
        return half
    if kind == "short":
        return int(_real["pwrite"](fd, data, offset))
    raise _error(kind)


def _write(fd: int, data: Any) -> int:
    kind = _ask("write")
    if not kind:
        return int(_real["write"](fd, data))
    with memoryview(data).cast("B") as view:
        half = max(1, len(view) // 2)
        done = int(_real["write"](fd, view[:half]))
    if kind == "short":
        return done
    raise _error(kind)


def _sync(name: str) -> Callable[[int], None]:
    def sync(fd: int) -> None:
        kind = _ask(name)
        if kind == "lost":
            _lose(fd)
        if kind:
            _synced(fd)  # the kernel tells of it once
            raise _error(kind)
        _real[name](fd)
        _synced(fd)

    return sync


def _plain(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if kind := _ask(name):
            error = _error(kind)
            if not isinstance(arguments[0], int):  # a path: the kernel's error names it
                error.filename = os.fspath(arguments[0])
            raise error
        return _real[name](*arguments, **named)

    return call


def _punch(real: Any) -> Callable[..., int]:
    def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
        if kind := _ask("punch"):
            ctypes.set_errno(_error(kind).errno or 0)
            return -1
        _keep(fd, offset, length)
        return int(real(fd, mode, offset, length))

    return fallocate


def _table(real: Any, call: str) -> Callable[..., Any]:
    def changed(*arguments: Any, **named: Any) -> Any:
        if kind := _ask(call):
            error = sqlite3.OperationalError("database or disk is full" if kind == "enospc" else "disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL if kind == "enospc" else sqlite3.SQLITE_IOERR
            raise error
        return real(*arguments, **named)

    return changed


def _parquet(real: Any) -> Callable[..., Any]:
    def write_table(*arguments: Any, **named: Any) -> Any:
        if not isinstance(arguments[1], str | os.PathLike):  # in memory, to be encrypted
            return real(*arguments, **named)
        kind = _ask("write_table")
        done = real(*arguments, **named)
        if kind:
            fresh = Path(arguments[1])
            os.truncate(fresh, fresh.stat().st_size // 2)
            raise _error(kind)
        return done

    return write_table


def _copied(real: Any) -> Callable[..., Any]:
    def copyfile(source: Any, target: Any, **named: Any) -> Any:
        kind = _ask("copyfile")
        done = real(source, target, **named)
        if kind:
            os.truncate(target, os.stat(target).st_size // 2)
            raise _error(kind)
        return done

    return copyfile


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on what this process does to a disk goes through here. `put` may remember what was there."""
    import shutil

    import pyarrow.parquet
    import sqlite_utils.db

    from pgcdp import fsio

    put(os, "pwrite", _pwrite)
    put(os, "write", _write)
    for name in SYNCS:
        put(os, name, _sync(name))
    for name in NAMES:
        put(os, name, _plain(name))
    libc = vars(fsio)["_libc"]
    put(libc, "fallocate", _punch(libc.fallocate))
    table = sqlite_utils.db.Table
    put(table, "upsert", _table(table.upsert, "upsert"))
    put(table, "delete_where", _table(table.delete_where, "delete_where"))
    put(pyarrow.parquet, "write_table", _parquet(pyarrow.parquet.write_table))
    put(shutil, "copyfile", _copied(shutil.copyfile))


if __name__ == "sitecustomize" and "agent" in sys.orig_argv and "PGCDP_TEST_FAULTS" in os.environ:
    install()
