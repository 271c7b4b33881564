"""Put a cluster behind capture and take it out again.

Both go through named steps. Before each, the step is written to a small state file in the set's state directory.
What a failure or a kill leaves is judged by that file and by what is there:

    protect     volume -> stop -> copy -> capture -> switch | start -> remove
    unprotect   stop -> copy (and detach)                   | switch -> start -> remove

Left of the bar everything is put back and the cluster runs as before; right of it, it is finished: once Postgres has
run on the new place, only that place holds what its clients wrote. The one exception: when Postgres does not start on
the new volume at all, protect puts back, since no client was served. The old copy goes last.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgcdp import config as settings
from pgcdp import fsio, log, proc
from pgcdp.capture import attach, checks, held, modes, places, planning, same_parts, volumes
from pgcdp.capture.checks import ProtectRequest
from pgcdp.capture.copying import copy_tree, measure
from pgcdp.config import Config, VolumeConfig
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Remark
from pgcdp.sets import SetPaths, set_paths

__all__ = ["ProtectRequest", "protect", "recover", "unprotect"]

PROTECT_STEPS = ("volume", "stop", "copy", "capture", "switch", "start", "remove")
UNPROTECT_STEPS = ("stop", "copy", "switch", "start", "remove")
FINISH_FROM = {"protect": "start", "unprotect": "switch"}
"""From this step on a killed run is finished, before it, it is put back."""
PUTTING_BACK = "back"
"""The step while putting back, so that a kill there never leads forward."""

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class _Pending:
    """The state file: what is done to which set, at which step, and what must be put back."""

    doing: str
    step: str
    config: Config
    was_running: bool
    initdb: bool
    stop_seconds: float

    def save(self) -> None:
        fsio.write_json(
            self.config.paths.protect_state,
            {
                "doing": self.doing,
                "step": self.step,
                "config": settings.render_config(self.config),
                "was_running": self.was_running,
                "initdb": self.initdb,
                "stop_seconds": self.stop_seconds,
            },
        )

    def at(self, step: str) -> _Pending:
        """The same at its next step, on disk before this returns."""
        later = replace(self, step=step)
        later.save()
        return later


def _load_pending(paths: SetPaths) -> _Pending | None:
    try:
        content: dict[str, Any] = fsio.read_json(paths.protect_state)
    except FileNotFoundError:
        return None
    return _Pending(
        doing=content["doing"],
        step=content["step"],
        config=settings.parse_config(content["config"], paths.name, paths.protect_state, paths.root),
        was_running=content["was_running"],
        initdb=content["initdb"],
        stop_seconds=content["stop_seconds"],
    )


# --- the three verbs


def protect(
    request: ProtectRequest, progress: Report = silent, warn: Callable[[Remark], None] = lambda remark: None
) -> Config:
    """Move a cluster onto captured volumes and start it there; the caller then starts the agent.

    Everything is checked before anything is changed; `warn` hears what does not keep it from being done. If a later
    step fails, all is put back and the cluster runs as before; after a kill, the same command (or `recover`) puts back
    or finishes. Raises UsageError, PreconditionError.
    """
    proc.check_root()
    paths = set_paths(request.name)
    with fsio.disk_errors(_then("protect", request.name)), attach.hold(paths):
        if _recover(paths, progress) == "protected":
            return settings.load_config(request.name)
        progress(Progress("checking"))
        plan = checks.check(request)
        for warning in plan.warnings:
            _log.warning("%s: %s", warning.name, warning.detail)
            warn(warning)
        config = plan.config
        paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        pending = _Pending("protect", "volume", config, plan.was_running, request.initdb, request.stop_seconds)
        pending.save()
        with _put_back_on_error(paths, progress):
            if request.initdb:
                progress(Progress("making the cluster"))
                config = checks.make_cluster(request, config)
                pending = replace(pending, config=config)
                pending.save()
            pending = _fill_volumes(pending, progress)
            pending = pending.at("switch")
            _switch_to_volumes(config, progress)
            pending = pending.at("start")
            attach.start_cluster(config, progress)
        _finish_protect(pending, progress)
    return config


def unprotect(
    config: Config,
    progress: Report = silent,
    captured: Callable[[], None] = attach.nothing,
    stopped: Callable[[], None] = attach.nothing,
) -> None:
    """Bring the cluster back to plain files at the same path; the store stays.

    `captured` is called when the engine answers and before Postgres is stopped, whose last checkpoint may need the room
    that the agent makes; `stopped` when nothing writes any more and the agent may end.
    If a step before the switch fails, the cluster runs on behind capture. Raises PreconditionError.
    """
    proc.check_root()
    paths = config.paths
    with fsio.disk_errors(_then("unprotect", config.name)), attach.hold(paths):
        if _recover(paths, progress) == "unprotected":
            return
        attach.refuse_pending(paths)
        was_running, was_attached = attach.cluster_runs(config), attach.is_attached(config)
        attach.attach(config, progress, captured=captured)
        try:
            _check_room(config)
        except PgcdpError:
            if not was_attached:
                attach.detach(config, progress)
            raise
        pending = _Pending("unprotect", "stop", config, was_running, False, attach.STOP_SECONDS)
        pending.save()
        with _put_back_on_error(paths, progress):
            attach.stop_cluster(config, progress)
            stopped()
            pending = pending.at("copy")
            _copy_to_plain(config, progress)
            attach.detach(config, progress)  # while it can be put back: nobody may write there after the copy
        _finish_unprotect(pending.at("switch"), progress)


def pending_config(name: str) -> Config | None:
    """The settings of the set that a protect or unprotect of was killed; None when nothing is pending."""
    pending = _load_pending(set_paths(name))
    return None if pending is None else pending.config


def recover(name: str, progress: Report = silent) -> str | None:
    """Finish or put back a protect or unprotect that was killed.

    Returns "protected" or "unprotected" for what the set is now, None when nothing was pending.
    """
    proc.check_root()
    paths = set_paths(name)
    with attach.hold(paths):
        return _recover(paths, progress)


def _then(verb: str, name: str) -> str:
    return f"mend that, then run pgcdp {verb} {name} again: what is left of this run is finished or put back first"


def _recover(paths: SetPaths, progress: Report) -> str | None:
    pending = _load_pending(paths)
    if pending is None:
        return None
    steps = PROTECT_STEPS if pending.doing == "protect" else UNPROTECT_STEPS
    if pending.step == PUTTING_BACK or steps.index(pending.step) < steps.index(FINISH_FROM[pending.doing]):
        _put_back(pending, progress)
        return "unprotected" if pending.doing == "protect" else "protected"
    if pending.doing == "protect":
        attach.attach(pending.config, progress)
        attach.start_cluster(pending.config, progress)
        _finish_protect(pending, progress)
        return "protected"
    _finish_unprotect(pending, progress)
    return "unprotected"


@contextmanager
def _put_back_on_error(paths: SetPaths, progress: Report) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        pending = _load_pending(paths)
        interrupted = not isinstance(error, Exception)
        if pending is not None and not (interrupted and pending.step == "start"):
            try:
                _put_back(pending, progress)
            except (PgcdpError, OSError) as second:
                raise PgcdpError(
                    f"{error}; and putting back failed: {second}",
                    f"mend that, then run pgcdp {pending.doing} {paths.name} again: it puts back what is left",
                ) from error
        raise


# --- steps of protect


def _fill_volumes(pending: _Pending, progress: Report) -> _Pending:
    """Make the volumes and their filesystems, stop the cluster, copy it, start capture."""
    config = pending.config
    progress(Progress("making the volume"))
    owner = config.pgdata.stat()
    for volume in config.volumes:
        if not volume.device:
            volumes.make_image(volume.backing, volume.bytes)
        device = volumes.attach_loop(volume.backing)
        try:
            volumes.make_filesystem(device, volume.fs, owner.st_uid, owner.st_gid, zeroed=not volume.device)
        finally:
            volumes.detach_loop(device)
    with _mounted_plain(config) as scratch:
        _check_fits(config, scratch)
        pending = pending.at("stop")
        attach.stop_cluster(config, progress, pending.stop_seconds)
        planning.refuse_outside(config.pgdata, [volume.mountpoint for volume in config.volumes])  # made meanwhile
        pending = pending.at("copy")
        targets = {volume.mountpoint: places.below(config, volume, scratch) for volume in config.volumes}
        _copy({place: targets[place] for place in places.places(config)}, "copying the cluster", progress)
        attach.syncfs(list(targets.values()))
    for volume in config.volumes:
        _sync_backing(volume)
    pending = pending.at("capture")
    progress(Progress("starting capture"))
    if config.journal.is_dir():
        modes.close_to_others(config.journal)
    held.start(config, create=True)
    same_parts.note(config)
    return pending


def _copy(pairs: Mapping[Path, Path], step: str, progress: Report) -> None:
    """Copy directories into existing ones, durably."""
    total = sum(measure(source).content for source in pairs)
    done = 0
    for source, target in pairs.items():
        copied = 0

        def tell(count: int, before: int = done) -> None:
            nonlocal copied
            copied = count
            progress(Progress(step, before + count, total))

        copy_tree(source, target, tell)
        done += copied


def _switch_to_volumes(config: Config, progress: Report) -> None:
    """The old directories step aside, empty mount points take their places, the volumes are mounted there."""
    for place in places.places(config):
        progress(Progress("switching to the volume"))
        status = place.stat()
        place.rename(places.before(place, config.name))
        place.mkdir(mode=0o700)
        os.chown(place, status.st_uid, status.st_gid)
        os.chmod(place, stat.S_IMODE(status.st_mode))
        fsio.sync_directory(place.parent)
    attach.attach(config, progress)


def _finish_protect(pending: _Pending, progress: Report) -> None:
    """From here on the volumes are the truth: the set exists, the old copy goes."""
    config = pending.config
    settings.save_config(config)
    pending.at("remove")
    for place in places.places(config):
        old = places.before(place, config.name)
        if old.exists():
            progress(Progress("removing the old copy"))
            shutil.rmtree(old)
            fsio.sync_directory(old.parent)
    _forget(config.paths)


@contextmanager
def _mounted_plain(config: Config) -> Iterator[Path]:
    """The volumes mounted in a scratch directory (`places.below`) straight from their backings, without capture."""
    scratch = config.paths.state
    try:
        for volume in config.volumes:
            where = places.below(config, volume, scratch)
            where.mkdir(mode=0o700, exist_ok=True)
            volumes.mount(volumes.attach_loop(volume.backing), where, volume.fs)
            lost = where / "lost+found"
            if lost.is_dir():
                lost.rmdir()
        yield scratch
    finally:
        _release_plain(config)


def _release_plain(config: Config) -> None:
    """Undo _mounted_plain, whatever there is of it."""
    where = [places.below(config, volume, config.paths.state) for volume in config.volumes]
    for place in reversed(where):
        volumes.unmount(place)
    for volume in config.volumes:
        for device in volumes.loops_over(Path(os.path.realpath(volume.backing))):
            volumes.detach_loop(device)
    for place in reversed(where):
        if place.is_dir():
            place.rmdir()


def _check_fits(config: Config, scratch: Path) -> None:
    """Raises PreconditionError when the data does not fit onto the fresh filesystems (with a twentieth to spare)."""
    for volume, need in places.contents(config):
        where = places.below(config, volume, scratch)
        checks.need_space(where, need + need // 20, f"volume {volume.name}", checks.size_option(volume))


def _sync_backing(volume: VolumeConfig) -> None:
    descriptor = os.open(volume.backing, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- steps of unprotect


def _check_room(config: Config) -> None:
    claims = []
    for place in places.places(config):
        need = measure(place).allocated
        claims.append((f"the plain copy of {place}", place.parent, need + need // 20, ""))
        if places.plain(place, config.name).exists():
            raise PreconditionError(f"{places.plain(place, config.name)} exists", "move it away or remove it")
    checks.check_space(claims)


def _copy_to_plain(config: Config, progress: Report) -> None:
    pairs = {place: places.plain(place, config.name) for place in places.places(config)}
    for target in pairs.values():
        target.mkdir(mode=0o700)
    _copy(pairs, "copying to plain storage", progress)
    for target in pairs.values():
        if (target / "lost+found").is_dir():
            (target / "lost+found").rmdir()
        fsio.sync_directory(target.parent)


def _finish_unprotect(pending: _Pending, progress: Report) -> None:
    """The plain copies are whole and durable: they take the mount points' places, then the rest goes."""
    config = pending.config
    for place in places.places(config):
        if places.plain(place, config.name).exists():
            progress(Progress("switching to plain storage"))
            os.rename(places.plain(place, config.name), place)
            fsio.sync_directory(place.parent)
    pending = pending.at("start")
    if pending.was_running:
        attach.start_cluster(config, progress)
    pending.at("remove")
    progress(Progress("removing volume and journal"))
    settings.remove_config(config)
    _remove_volumes(config)
    _forget(config.paths)


# --- putting back


def _put_back(pending: _Pending, progress: Report) -> None:
    """Bring the cluster back to where it was before, from whatever is there now. May be repeated."""
    config = pending.config
    progress(Progress("putting everything back"))
    _log.warning("%s of %s is put back from step %s", pending.doing, config.name, pending.step)
    pending.at(PUTTING_BACK)
    if pending.doing == "unprotect":
        for place in places.places(config):
            shutil.rmtree(places.plain(place, config.name), ignore_errors=True)
        attach.attach(config, progress)
    else:
        attach.discard(config)
        _release_plain(config)
        for place in places.places(config):
            if places.before(place, config.name).exists():
                if place.exists():
                    place.rmdir()
                places.before(place, config.name).rename(place)
                fsio.sync_directory(place.parent)
        settings.remove_config(config)
        if pending.initdb:
            checks.remove_cluster(config)
        _remove_volumes(config)
    if pending.was_running:
        attach.start_cluster(config, progress)
    if pending.doing == "protect":
        _remove_if_empty(config.paths.volumes)
    _forget(config.paths)


def _remove_volumes(config: Config) -> None:
    """Image files and journal; a block device stays as it is."""
    for volume in config.volumes:
        if not volume.device:
            volume.backing.unlink(missing_ok=True)
    shutil.rmtree(config.journal, ignore_errors=True)
    same_parts.forget(config.paths)


def _forget(paths: SetPaths) -> None:
    """The run is over: the state file goes last of all that it speaks of."""
    fsio.remove_durably(paths.protect_state)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return
