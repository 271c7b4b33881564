"""Take a tablespace into a set that is protected already: `protect SET --tablespace`, and what a kill has left of it.

The set gets one more volume. Its bytes are zeros at first, so that image and journal need no baseline of it: the
filesystem is made and the tablespace copied through the capture layer, while Postgres is stopped and the agent stores
what is written. The step lies in the set's state directory, durably, before it begins:

    add      volume in the store, capture with it, filesystem, copy       | put back
    switch   the old directory aside, the volume in its place, Postgres   | finished, or put back if that does not start
    back     the old directory in its place again                        | put back
    remove   the old directory                                           | finished

What is put back leaves a volume in the store that nothing is written to; the next one takes its number. Putting back
needs nothing of the new volume or of the store: what is in the journal for that volume is left out of the replay.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pgcdp import config as settings
from pgcdp import fsio, keys, log, proc, service
from pgcdp.capture import attach, checks, held, places, planning, volumes
from pgcdp.capture.control import EngineClient
from pgcdp.capture.copying import copy_tree, measure
from pgcdp.capture.planning import Backing, Wish
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import PgcdpError, PreconditionError, UsageError
from pgcdp.postgres import cluster
from pgcdp.postgres.control import State
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Volume
from pgcdp.sets import SetPaths
from pgcdp.store.image import add_volume, grow_volume
from pgcdp.store.layout import Store
from pgcdp.units import exact_size

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class Pending:
    """A volume on its way into the set. `before` are the settings without it, `after` those with it, which is their
    last volume. `captured`: whether the journal may hold writes to it; `since`: the write from which on it holds the
    tablespace, `checkpoint`: the LSN of the one at which Postgres was stopped, once these are known. `started`: whether
    Postgres may have run on it."""

    step: str
    before: Config
    after: Config
    captured: bool = False
    since: int = 0
    checkpoint: int = 0
    started: bool = False

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
            "captured": self.captured,
            "since": self.since,
            "checkpoint": self.checkpoint,
            "started": self.started,
        }
        fsio.write_json(self.before.paths.extend_state, content)


def pending(paths: SetPaths) -> Pending | None:
    """What a kill or an error has left. Raises DamageError when its file is not whole.

    The settings are those of SET.toml, where it can be read: what was changed there since holds.
    """
    file = paths.extend_state
    try:
        content = fsio.read_json(file)
    except FileNotFoundError:
        return None
    before, after = (settings.parse_config(content[name], paths.name, file, paths.root) for name in ("before", "after"))
    volume = after.volumes[-1]
    with suppress(PgcdpError):
        now = settings.load_config(paths.name)
        kept = tuple(each for each in now.volumes if each.name != volume.name)
        before, after = replace(now, volumes=kept), replace(now, volumes=(*kept, volume))
    return Pending(
        content["step"], before, after, content["captured"], content["since"], content["checkpoint"], content["started"]
    )


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
    proc.check_root()
    with fsio.disk_errors(_then(config)), attach.hold(config.paths):
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
                doing.save()
            except BaseException:
                _give_up(doing, progress)
                raise
            config = _finish(pending(config.paths) or doing, progress)
    return config


def resume(config: Config, progress: Report = silent) -> None:
    """What `up` does first: put back what a kill has left, or finish it."""
    with fsio.disk_errors(_then(config)), attach.hold(config.paths):
        _recover(config.paths, progress)


def _then(config: Config) -> str:
    return f"mend that, then pgcdp up {config.name}: it finishes taking in the tablespace, or puts back"


def _recover(paths: SetPaths, progress: Report) -> None:
    left = pending(paths)
    if left is None:
        return
    if left.step in ("add", "back"):
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
    keys.refuse_captured(keys.source_of(config.store), [space.location])
    if cluster.read_control(config.pgdata).state != State.IN_PRODUCTION:
        raise PreconditionError(
            f"the cluster at {config.pgdata} is a standby", "promote it first, or protect its primary"
        )
    store = Store.open(config.store, config.set_id_bytes)
    unused = store.volumes[len(config.volumes) :]
    volume = unused[0].name if unused else planning.volume_name(space, [each.name for each in store.volumes])
    wish = Wish(volume, backing, f"--tablespace {name}", fs, space.location)
    (made,) = planning.planned([wish], config.paths.volumes, overwrite)
    if unused and made.bytes < unused[0].bytes:
        raise PreconditionError(
            f"the set has a volume {volume} without data from an earlier run, of {unused[0].bytes} bytes; this one has "
            f"{made.bytes}",
            f"give it that size or a larger one: --tablespace {name}={exact_size(unused[0].bytes)}",
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
    stopped = cluster.read_control(before.pgdata)
    service.stop(before)
    attach.detach(before, progress)
    reused = _add_to_store(doing)
    doing = replace(doing, captured=True, checkpoint=stopped.checkpoint_lsn)
    doing.save()
    client = attach.start_capture(after, progress, captured=lambda: service.start(before))
    device = attach.attach_devices(after, progress)[-1]
    if reused:
        _discard(device, volume.bytes)  # what an earlier run has left in the image
    with service.kept(before):
        _copy_to(doing, device, progress)
    return replace(doing, step="switch", since=client.cut())


def _fill_with_zeros(device: Path, progress: Report) -> None:
    """Before it is captured: the image begins with zeros, too."""
    size = volumes.backing_bytes(device)
    fd = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    try:
        volumes.zero_out(fd, 0, size, lambda done: progress(Progress(volumes.ZEROING, done, size)))
        os.fsync(fd)
    finally:
        os.close(fd)


def _discard(device: Path, size: int) -> None:
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        volumes.discard(fd, 0, size)
    finally:
        os.close(fd)


def _add_to_store(doing: Pending) -> bool:
    """The store has the volume; whether it had it before, from a run that was put back."""
    store = Store.open(doing.before.store, doing.before.set_id_bytes)
    number = len(doing.before.volumes)
    with store.lock():
        if len(store.volumes) == number:
            add_volume(store, Volume(number, doing.volume.name, doing.volume.bytes))
            return False
        if doing.volume.bytes > store.volumes[number].bytes:
            grow_volume(store, number, doing.volume.bytes)
    return True


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
        try:
            _switch(doing, aside, progress)
        except (PgcdpError, OSError):
            doing = pending(config.paths) or doing
            if _untouched(doing):  # no client was served since: the old directory holds all of it
                doing = replace(doing, step="back")
                doing.save()
                _put_back(doing, progress)
            raise
        doing = replace(doing, step="remove")
        doing.save()
    progress(Progress("removing the old copy"))
    if aside.exists():
        shutil.rmtree(aside)
        fsio.sync_directory(aside.parent)
    _forget(config.paths)
    return config


def _switch(doing: Pending, aside: Path, progress: Report) -> None:
    config, place = doing.after, doing.volume.mountpoint
    progress(Progress("switching to the volume"))
    service.stop(config)
    settings.save_config(config)
    if not aside.exists():
        place.rename(aside)
    if not place.exists():
        status = aside.stat()
        place.mkdir(mode=0o700)
        os.chown(place, status.st_uid, status.st_gid)
        os.chmod(place, stat.S_IMODE(status.st_mode))
    fsio.sync_directory(place.parent)
    attach.attach(config, progress, captured=lambda: service.start(config))
    service.stop(config)
    store = Store.open(config.store, config.set_id_bytes)
    with store.lock():
        store.mounted(doing.volume.name, place, doing.volume.fs, doing.since)
    service.start(config)
    replace(doing, started=True).save()
    attach.start_cluster(config, progress)


def _untouched(doing: Pending) -> bool:
    """Whether Postgres has not come up since it was stopped for this."""
    try:
        control = cluster.read_control(doing.after.pgdata)
    except PgcdpError:  # not mounted: the new volume may be what keeps capture from starting
        return not doing.started
    return control.state == State.SHUT_DOWN and control.checkpoint_lsn == doing.checkpoint


def _give_up(doing: Pending, progress: Report) -> None:
    left = pending(doing.before.paths) or doing
    if left.step != "add":  # it stands in the file, but whether for good is not known: a kill must not lead forward
        left = replace(left, step="add")
        left.save()
    _put_back(left, progress)


def _put_back(doing: Pending, progress: Report) -> None:
    """Production runs as before, without the volume. May be repeated."""
    before, volume = doing.before, doing.volume
    progress(Progress("putting everything back"))
    _log.warning("the tablespace in %s is not taken into %s", volume.mountpoint, before.name)
    if doing.captured:
        if EngineClient(before.paths.control).alive():
            service.start(before)  # unmounting may wait for room in the journal
        else:
            held.cut_off(before.paths)  # unmounting shall not wait for one that may never come up
        _unmount_scratch(doing)
        _capture_without(doing, progress)
    if doing.step == "back":
        _switch_back(doing)
    if not volume.device:
        volume.backing.unlink(missing_ok=True)
    attach.attach(before, progress, captured=lambda: service.start(before))
    service.start(before)
    attach.start_cluster(before, progress)
    _forget(before.paths)


def _unmount_scratch(doing: Pending) -> None:
    where = _scratch(doing)
    try:
        volumes.unmount(where)
    except PgcdpError as error:  # its volume may be what fails
        _log.warning("%s", error)
        volumes.unmount_lazily(where)
    if where.is_dir():
        where.rmdir()


def _capture_without(doing: Pending, progress: Report) -> None:
    """Capture runs without the new volume, whatever has become of that: its writes need not get there any more."""
    before, client = doing.before, EngineClient(doing.before.paths.control)
    if client.alive():
        if len(client.status().volumes) == len(before.volumes):
            return
        try:
            attach.end_postgres(doing.after, progress)
            attach.detach(doing.after, progress)
        except (PgcdpError, OSError) as error:
            _log.warning("capture with the new volume does not end cleanly: %s", error)
            held.cut_off(before.paths)
    if not client.alive():
        attach.clean_leftovers(doing.after, progress)
        held.start(before, put_back=True)


def _switch_back(doing: Pending) -> None:
    """The old directory is in its place again; nothing is mounted there. What the store says, the agent corrects."""
    before, place = doing.before, doing.volume.mountpoint
    aside = places.before(place, before.name)
    service.stop(before)
    if aside.exists():
        if place.exists():
            place.rmdir()  # the mount point
        aside.rename(place)
        fsio.sync_directory(place.parent)
    settings.save_config(before)


def _forget(paths: SetPaths) -> None:
    fsio.remove_durably(paths.extend_state)
