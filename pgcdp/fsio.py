"""Files that survive a kill and a power cut: atomic publish, locks, holes, checksummed JSON.

The order is always the same: content synced, then the rename, then the directory synced. A name that can be seen
therefore has its whole content behind it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from pgcdp import proc, sealing
from pgcdp.errors import DamageError, PgcdpError, PreconditionError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_WRITE_AND_WAIT = 7
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER."""
_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2
_ZEROS = bytes(1 << 20)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What an OSError of a full disk, or of a quota, has."""
STEADY_BYTES = 8 << 20
"""Bytes written to a file after which `SteadyWrites` has them brought to the disk."""


@contextmanager
def naming(fd: int) -> Iterator[None]:
    """An OSError of a call on this descriptor names its file: who is told of a full disk must know which."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            with suppress(OSError):
                error.filename = os.readlink(f"/proc/self/fd/{fd}")
        raise


def told(error: OSError) -> str:
    """An error of a disk in words: the file, what is wrong, the number."""
    where = f"{os.fspath(error.filename)}: " if error.filename is not None else ""
    return f"{where}{(error.strerror or str(error)).lower()}" + (f" (error {error.errno})" if error.errno else "")


@contextmanager
def disk_errors(then: str) -> Iterator[None]:
    """An OSError inside, which is no bug of ours, comes as PgcdpError: what the system said, and what to do then."""
    try:
        yield
    except BrokenPipeError:  # of who reads what a command says
        raise
    except OSError as error:
        raise PgcdpError(told(error), then) from error


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it are durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(fd):
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """fsync a file that was written by its name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(fd):
            os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Make a directory if it is missing and sync its parent. The parent must exist."""
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        if not path.is_dir():
            raise PgcdpError(f"{path} is not a directory") from None
    sync_directory(path.parent)


def write_atomic(path: Path, content: bytes, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
    """Replace a file by rename: whoever reads it sees the old or the new content, also after a power cut.

    `owner`: user and group that it has from the beginning. The directory may be somebody else's: what lies there under
    the name of the new file, which a kill or its owner has left, is not followed.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        write_all(fd, content, 0)
        if owner is not None:
            os.fchown(fd, *owner)
        with naming(fd):
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """Remove a file for good. When that is not sure to last, it is there as before, for whoever tries again.

    Raises OSError.
    """
    content = path.read_bytes()
    path.unlink()
    try:
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            write_atomic(path, content)
        raise


def publish_directory(source: Path, target: Path) -> None:
    """Rename a finished directory to the name under which it counts. Its files must be synced already."""
    sync_directory(source)
    os.rename(source, target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def read_all(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`, fewer only at the end of the file."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    got = len(data)
    while data and got < length:
        data = os.pread(fd, length - got, offset + got)
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. OSError names the file."""
    try:
        done = os.pwrite(fd, data, offset)
        if done < len(data):
            view = memoryview(data)
            while done < len(view):
                done += os.pwrite(fd, view[done:], offset + done)
    except OSError:
        with naming(fd):
            raise


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make a range read back as zeros and give its space back; writes zeros where the filesystem has no holes."""
    if length <= 0:
        return
    code = errno.EINTR
    while code == errno.EINTR:
        if _libc.fallocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length) == 0:
            return
        code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL):
        with naming(fd):
            raise OSError(code, os.strerror(code))
    while length > 0:
        step = min(length, len(_ZEROS))
        write_all(fd, _ZEROS[:step], offset)
        offset += step
        length -= step


class SteadyWrites:
    """Brings to the disk what is written to a file, some MiB at a time, so that a sync at its end finds little.

    A sync of hundreds of MiB at once keeps the disk busy for as long as that takes, and each commit of production on
    the same disk waits behind it. Nothing is durable by this: the sync is still needed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting = 0

    def wrote(self, length: int) -> None:
        """So many more bytes were written. Raises OSError when some cannot be."""
        self._waiting += length
        if self._waiting < STEADY_BYTES:
            return
        self._waiting = 0
        code = errno.EINTR
        while code == errno.EINTR:
            if _libc.sync_file_range(self._fd, 0, 0, _WRITE_AND_WAIT) == 0:
                return
            code = ctypes.get_errno()
        if code not in (errno.ESPIPE, errno.ENOSYS, errno.EINVAL):  # else this file or kernel has no such thing
            with naming(self._fd):
                raise OSError(code, os.strerror(code))


def free_space(path: Path) -> int:
    """Bytes that a process without privileges may still write on the filesystem of `path`."""
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize


def bytes_in(files: Iterable[Path]) -> int:
    """Sum of their sizes, without those that are gone, or were renamed, since they were listed."""
    size = 0
    for file in files:
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


LEFT_SECONDS = 5.0
"""How long it is waited for who has a lock for a moment only: a child that a process which has ended was starting,
until its exec, and who asks whether it is locked."""


class FileLock:
    """An exclusive flock, held until `release()` or the end of the process; a context manager.

    Raises PreconditionError naming the holder's process id when somebody else has it, with `wait` seconds only when
    somebody has it still after these; math.inf waits for as long as it takes.
    """

    def __init__(self, path: Path, owner: str, *, wait: float = 0.0) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait == math.inf else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                holder = os.pread(self._fd, 64, 0).decode("ascii", "replace").strip() or "unknown"
                passing = (holder.isdecimal() and not proc.exists(int(holder))) or self._is_only_asked_for()
                if time.monotonic() - begun >= max(wait, LEFT_SECONDS if passing else 0.0):
                    os.close(self._fd)
                    raise PreconditionError(
                        f"{path} is locked by {owner}, process {holder}",
                        "only one may run for a set; stop the other one first",
                    ) from None
            time.sleep(0.02)
        with suppress(OSError):  # a full disk: whose it is cannot be told then, but it is held
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _is_only_asked_for(self) -> bool:
        """Whether nobody has it but those who ask (`is_locked`), and have it shared for that."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def release(self) -> None:
        """Give the lock back; harmless when done twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Whether somebody has an exclusive flock on a file now; False when there is no such file. Writes nothing.

    Raises OSError when it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # its owner has ended it
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # those who ask at the same time are not in each other's way
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically and synced; encrypted where it lies in an encrypted store."""
    write_atomic(path, sealing.sealed(path, content))


def read_file(path: Path) -> bytes:
    """What `write_file` wrote. Raises DamageError when it is not what was encrypted, FileNotFoundError."""
    return sealing.unsealed(path, path.read_bytes())


def json_checksum(content: Mapping[str, object]) -> str:
    """16 hex digits over all keys but `checksum` as canonical JSON (FORMAT.md 3)."""
    plain = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_64_hexdigest(text.encode())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file with its checksum, atomically and synced."""
    whole = {**content, "checksum": json_checksum(content)}
    write_file(path, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file without its checksum.

    Raises DamageError when it is no JSON object or the checksum is wrong, FileNotFoundError when it is missing.
    """
    hint = "pgcdp check --full tells what else is damaged and what can still be restored"
    raw = read_file(path)
    try:
        content = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        offset = getattr(error, "pos", getattr(error, "start", 0))
        raise DamageError(f"{path} is no JSON at offset {offset}", hint) from None
    if not isinstance(content, dict) or "checksum" not in content:
        raise DamageError(f"{path} has no checksum at offset 0", hint)
    if content.pop("checksum") != json_checksum(content):
        raise DamageError(f"{path} has a wrong checksum at offset 0", hint)
    return content
