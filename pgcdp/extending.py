"""Take a tablespace into a set that is protected already: `protect SET --tablespace`, and what a kill has left of it.

The set gets one more volume. Its bytes are zeros at first, so that image and journal need no baseline of it: the
filesystem is made and the tablespace copied through the capture layer, while Postgres is stopped and the agent stores
what is written. The step lies in the set's state directory, durably, before it begins:

    add      volume in the store, capture with it, filesystem, copy       | put back
    switch   the old directory aside, the volume in its place, Postgres   | finished
    remove   the old directory                                           | finished

What is put back leaves a volume in the store that nothing is written to; the next one takes its number.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pgcdp import config as settings
from pgcdp import fsio, log, service
from pgcdp.capture import attach, checks, places, planning, volumes
from pgcdp.capture.copying import copy_tree, measure
from pgcdp.capture.engine import EngineClient, spawn_capture
from pgcdp.capture.planning import Backing, Wish
from pgcdp.config import Config, SetPaths, VolumeConfig
from pgcdp.errors import PreconditionError, UsageError
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Volume
from pgcdp.store.image import add_volume
from pgcdp.store.layout import Store

_log = log.get(__name__)

_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_PIECE = 1 << 30


@dataclass(frozen=True, slots=True)
class Pending:
    """A volume on its way into the set. `before` are the settings without it, `after` those with it, which is their
    last volume; `since`: the write from which on it holds the tablespace, once that is known."""

    step: str
    before: Config
    after: Config
    since: int = 0

    @property
    def volume(self) -> VolumeConfig:
        """The new one."""
        return self.after.volumes[-1]

    def save(self) -> None:
        """Make it the set's state, durably."""
        content = {
            "step": self.step,
            "before": settings.render_config(self.before),
            "after": settings.render_config(self.after),
            "since": self.since,
        }
        fsio.write_json(self.before.paths.extend_state, content)


def pending(paths: SetPaths) -> Pending | None:
    """What a kill or an error has left. Raises DamageError when its file is not whole."""
    file = paths.extend_state
    try:
        content = fsio.read_json(file)
    except FileNotFoundError:
        return None
    before, after = (settings.parse_config(content[name], paths.name, file, paths.root) for name in ("before", "after"))
    return Pending(content["step"], before, after, content["since"])


def add_tablespaces(
    config: Config,
    wanted: Sequence[tuple[str, Backing]],
    fs: str | None = None,
    overwrite: bool = False,
    progress: Report = silent,
) -> Config:
    """Give each tablespace, by name or OID, a volume of the set; the cluster is stopped meanwhile.

    Everything is checked before anything is changed. If a later step fails, all is put back. `fs`: None for that of the
    set. Returns the settings. Raises UsageError, PreconditionError.
    """
    checks.check_root()
    with attach.hold(config.paths):
        _recover(config.paths, progress)
        config = settings.load_config(config.name)
        attach.refuse_pending(config.paths)
        attach.attach(config, progress, captured=lambda: service.start(config))
        service.start(config)
        attach.start_cluster(config, progress)
        progress(Progress("checking"))
        service.await_following(config.paths)
        for name, backing in wanted:
            _check(config, name, backing, fs or config.fs, overwrite)
        for name, backing in wanted:
            doing = _check(config, name, backing, fs or config.fs, overwrite)
            doing.save()
            try:
                doing = _add(doing, progress)
            except BaseException:
                _put_back(doing, progress)
                raise
            doing.save()
            config = _finish(doing, progress)
    return config


def resume(config: Config, progress: Report = silent) -> None:
    """What `up` does first: put back what a kill has left, or finish it."""
    with attach.hold(config.paths):
        _recover(config.paths, progress)


def _recover(paths: SetPaths, progress: Report) -> None:
    left = pending(paths)
    if left is None:
        return
    if left.step == "add":
        _put_back(left, progress)
    else:
        _finish(left, progress)


# --- checks


def _check(config: Config, name: str, backing: Backing, fs: str, overwrite: bool) -> Pending:
    """What is to be done. Changes nothing; raises UsageError, PreconditionError."""
    checks.check_machine({fs})
    space = planning.space_named(name, planning.spaces_of(config.pgdata, config.cluster, running=True))
    mountpoints = [volume.mountpoint for volume in config.volumes]
    if any(Path(os.path.realpath(space.location)).is_relative_to(os.path.realpath(place)) for place in mountpoints):
        raise UsageError(f"{space} is in the set already, in {space.location}", "pgcdp status lists the volumes")
    planning.check_places([space.location], places.places(config))
    store = Store.open(config.store, config.set_id_bytes)
    unused = store.volumes[len(config.volumes) :]
    volume = unused[0].name if unused else planning.volume_name(space, [each.name for each in store.volumes])
    wish = Wish(volume, backing, f"--tablespace {name}", fs, space.location)
    (made,) = planning.planned([wish], config.paths.volumes, overwrite)
    if unused and made.bytes != unused[0].bytes:
        raise PreconditionError(
            f"the set has a volume {volume} without data from an earlier run, of {unused[0].bytes} bytes; this one has "
            f"{made.bytes}",
            f"give it the same size: --tablespace {name}={settings.exact_size(unused[0].bytes)}",
        )
    for place in (places.before(space.location, config.name), places.plain(space.location, config.name)):
        if os.path.lexists(place):
            raise PreconditionError(f"{place} exists", "it is left from an earlier run: move it away or remove it")
    need = measure(space.location).allocated
    if made.bytes < need + need // 20:
        raise PreconditionError(
            f"{space} has {need} bytes, which do not fit on a volume of {made.bytes}", "choose a larger --tablespace"
        )
    image = [] if made.device else [(f"the {volume} volume", made.backing, made.bytes, "--tablespace")]
    # What is copied goes through the journal into the interval, and with its end into the image.
    checks.check_space([*image, ("the store", config.store, 2 * need + need // 10, "--store")])
    return Pending("add", config, replace(config, volumes=(*config.volumes, made)))


# --- steps


def _add(doing: Pending, progress: Report) -> Pending:
    """The volume captured, with the tablespace on it; nothing is mounted and Postgres is stopped."""
    before, after, volume = doing.before, doing.after, doing.volume
    progress(Progress("making the volume"))
    if volume.device:
        _fill_with_zeros(volume.backing, progress)
    else:
        volumes.make_image(volume.backing, volume.bytes)
    service.await_following(before.paths)
    progress(Progress("cutting"))  # so that what follows is an interval of its own
    service.ask(before.paths, "cut", timeout=None)
    attach.stop_cluster(before, progress)
    service.stop(before)
    attach.detach(before, progress)
    _add_to_store(doing)
    client = attach.start_capture(after, progress, captured=lambda: service.start(before))
    device = attach.attach_devices(after, progress)[-1]
    _discard(device, volume.bytes)  # what an earlier run has left in the image
    _copy_to(doing, device, progress)
    return replace(doing, step="switch", since=client.cut())


def _fill_with_zeros(device: Path, progress: Report) -> None:
    """Before it is captured: the image begins with zeros, too."""
    size = volumes.backing_bytes(device)
    fd = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    try:
        for at in range(0, size, _PIECE):
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("<QQ", at, min(_PIECE, size - at)))
            progress(Progress("filling the device with zeros", min(at + _PIECE, size), size))
        os.fsync(fd)
    finally:
        os.close(fd)


def _discard(device: Path, size: int) -> None:
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("<QQ", 0, size))
    finally:
        os.close(fd)


def _add_to_store(doing: Pending) -> None:
    store = Store.open(doing.before.store, doing.before.set_id_bytes)
    number = len(doing.before.volumes)
    if len(store.volumes) > number:
        return
    with store.lock():
        add_volume(store, Volume(number, doing.volume.name, doing.volume.bytes))


def _copy_to(doing: Pending, device: Path, progress: Report) -> None:
    """Make the filesystem and copy the tablespace, all of it captured."""
    place, volume = doing.volume.mountpoint, doing.volume
    status = place.stat()
    where = _scratch(doing)
    volumes.make_filesystem(device, volume.fs, status.st_uid, status.st_gid, zeroed=True)
    where.mkdir(mode=0o700, exist_ok=True)
    volumes.mount(device, where, volume.fs)
    try:
        if (where / "lost+found").is_dir():
            (where / "lost+found").rmdir()
        size = measure(place)
        checks.need_space(where, size.allocated + size.allocated // 20, f"volume {volume.name}", "--tablespace")
        copy_tree(place, where, lambda done: progress(Progress("copying the tablespace", done, size.content)))
        volumes.sync_filesystem(where)
    finally:
        volumes.unmount(where)
        where.rmdir()


def _scratch(doing: Pending) -> Path:
    return places.below(doing.after, doing.volume, doing.after.paths.state)


def _finish(doing: Pending, progress: Report) -> Config:
    """From whatever a kill has left of `switch` or `remove` to a cluster that runs on all its volumes."""
    config, place = doing.after, doing.volume.mountpoint
    aside = places.before(place, config.name)
    if doing.step == "switch":
        progress(Progress("switching to the volume"))
        service.stop(config)
        store = Store.open(config.store, config.set_id_bytes)
        with store.lock():
            store.mounted(doing.volume.name, place, doing.volume.fs, doing.since)
        if not aside.exists():
            place.rename(aside)
        if not place.exists():
            status = aside.stat()
            place.mkdir(mode=0o700)
            os.chown(place, status.st_uid, status.st_gid)
            os.chmod(place, stat.S_IMODE(status.st_mode))
        fsio.sync_directory(place.parent)
        settings.save_config(config)
        attach.attach(config, progress, captured=lambda: service.start(config))
        service.start(config)
        attach.start_cluster(config, progress)
        doing = replace(doing, step="remove")
        doing.save()
    progress(Progress("removing the old copy"))
    if aside.exists():
        shutil.rmtree(aside)
        fsio.sync_directory(aside.parent)
    _forget(config.paths)
    return config


def _put_back(doing: Pending, progress: Report) -> None:
    """Production runs as before, without the volume. May be repeated."""
    before, volume = doing.before, doing.volume
    progress(Progress("putting everything back"))
    _log.warning("the tablespace in %s is not taken into %s", volume.mountpoint, before.name)
    volumes.unmount(_scratch(doing))
    if _scratch(doing).is_dir():
        _scratch(doing).rmdir()
    client = EngineClient(before.paths.control)
    if client.alive() or _captured_with(doing):
        # Its writes may be in the journal only: they are brought to the volume, or the next replay would miss it.
        if not client.alive():
            attach.clean_leftovers(doing.after, progress)
            spawn_capture(doing.after)
        service.start(before)  # unmounting may wait for room in the journal
        if len(client.status().volumes) > len(before.volumes):
            attach.detach(doing.after, progress)
    if not volume.device:
        volume.backing.unlink(missing_ok=True)
    attach.attach(before, progress, captured=lambda: service.start(before))
    service.start(before)
    attach.start_cluster(before, progress)
    _forget(before.paths)


def _captured_with(doing: Pending) -> bool:
    """Whether capture can have run with the volume: it is in the store, and its backing is whole."""
    store = Store.open(doing.before.store, doing.before.set_id_bytes)
    try:
        whole = volumes.backing_bytes(doing.volume.backing) == doing.volume.bytes
    except OSError:
        return False
    return whole and len(store.volumes) > len(doing.before.volumes)


def _forget(paths: SetPaths) -> None:
    paths.extend_state.unlink()
    fsio.sync_directory(paths.state)
