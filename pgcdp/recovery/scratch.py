"""A recovery point in a scratch place, shown or copied, mounted for a while, gone afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pgcdp import proc
from pgcdp.capture import places, volumes
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.fsio import free_space
from pgcdp.intervals.applying import FileTarget
from pgcdp.proc import check_root
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import RecoveryPoint
from pgcdp.recovery.materializing import materialize
from pgcdp.recovery.places import place_below
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import shown


def write_images(source: Source, point: RecoveryPoint, files: list[Path], progress: Report) -> int:
    """Materialize into new sparse files, synced; one for each volume of the set (`Store.in_use`)."""
    need = sum(os.stat(source.store.image / f"{v.name}.img").st_blocks * 512 for v in source.store.in_use)
    have = free_space(files[0].parent)
    if have < need:
        raise PreconditionError(
            f"{files[0].parent} has {have} bytes free, the restored volumes need {need}",
            "free space or choose another place",
        )
    with ExitStack() as stack:
        fds = []
        for file in files:
            fds.append(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            stack.callback(os.close, fds[-1])
        with source.held():
            wanted = source.store.in_use
            if len(wanted) != len(files):
                raise PreconditionError("the set has got another volume meanwhile", "run this again")
            for fd, volume in zip(fds, wanted, strict=True):
                os.ftruncate(fd, volume.bytes)
            put_back = {each.number for each in source.store.volumes} - {each.number for each in wanted}
            materialize(source, point, FileTarget(fds), progress, put_back)
        for fd in fds:
            os.fsync(fd)
    return sum(volume.bytes for volume in source.store.in_use)


@contextmanager
def mounted(
    source: Source, point: RecoveryPoint, below: Path, progress: Report = silent, *, forgive: bool = False
) -> Iterator[Path]:
    """The recovery point as a mounted data directory, opened in place: nothing is copied, whatever its size.

    It can be written to; all of that is gone afterwards. `forgive`: as `view.shown`. Raises PreconditionError for
    anybody but root.
    """
    check_root()
    with (
        place_below(below) as scratch,
        shown(source, point, scratch, progress, forgive=forgive) as files,
        _mounted(source, point, scratch, files, volumes.WRITE_THROUGH, progress) as place,
    ):
        yield place


@contextmanager
def copied(source: Source, point: RecoveryPoint, below: Path, progress: Report = silent) -> Iterator[Path]:
    """The same in files of its own: every byte of it has been read and checked."""
    check_root()
    with place_below(below) as scratch:
        files = [scratch / f"{volume.name}.img" for volume in source.store.in_use]
        write_images(source, point, files, progress)
        with _mounted(source, point, scratch, files, volumes.WRITE_BACK, progress) as place:
            yield place


@contextmanager
def _mounted(
    source: Source, point: RecoveryPoint, scratch: Path, files: list[Path], mode: str, progress: Report
) -> Iterator[Path]:
    """The filesystems of all volumes, mounted below `scratch` as they belong together."""
    with ExitStack() as stack:
        yield _mount_all(stack, source, point, scratch, files, mode, progress)


def leave_mounted(
    source: Source, point: RecoveryPoint, scratch: Path, files: list[Path], progress: Report = silent
) -> Path:
    """The filesystems of all volumes, mounted below `scratch` for good: `clear` ends that."""
    with ExitStack() as stack:
        place = _mount_all(stack, source, point, scratch, files, volumes.WRITE_THROUGH, progress)
        stack.pop_all()
    return place


def _mount_all(
    stack: ExitStack,
    source: Source,
    point: RecoveryPoint,
    scratch: Path,
    files: list[Path],
    mode: str,
    progress: Report,
) -> Path:
    """Mount, and have `stack` take it all back."""
    # A view shows the volume that was put back, too, which is the last one.
    file_of = {volume.name: file for volume, file in zip(source.store.volumes, files, strict=False)}
    for name, where in _layout(source, point, scratch).items():
        progress(Progress(f"mounting volume {name}"))
        where.mkdir(mode=0o700, exist_ok=True)
        device = volumes.attach_loop(file_of[name], mode)
        stack.callback(volumes.detach_loop, device)
        _mount(device, where, source.store.extra["filesystems"][name])
        stack.callback(volumes.unmount, where)
    return scratch / places.DATA_DIRECTORY


def elsewhere(source: Source, point: RecoveryPoint, pgdata: Path) -> dict[Path, Path]:
    """Where the recovery point that is mounted at `pgdata` has production's directories: {production's: its own}.

    The links of the cluster name production's (`recovery.links`).
    """
    where = _layout(source, point, pgdata.parent)
    return {Path(source.store.extra["mountpoints"][name]): place for name, place in where.items()}


def _layout(source: Source, point: RecoveryPoint, scratch: Path) -> dict[str, Path]:
    """Without the volumes that had no data yet."""
    extra, since = source.store.extra, source.store.since
    mountpoints = {
        name: Path(place) for name, place in extra["mountpoints"].items() if since.get(name, 0) <= point.write
    }
    return places.layout(Path(extra["pgdata"]), mountpoints, scratch)


def _mount(device: Path, where: Path, fs: str) -> None:
    """The filesystem's own log is replayed by this; production's bears the same UUID, so xfs must not look at it."""
    options = ["-o", "nouuid"] if fs == "xfs" else []
    try:
        proc.run(["mount", "-t", fs, *options, os.fspath(device), os.fspath(where)])
    except proc.ProcessFailed as error:
        raise DamageError(f"the restored {fs} on {device} cannot be mounted: {error.message}") from None
