"""Take in what the volumes have and nobody captured: `pgcdp up --heal`, and what a kill of it has left.

Somebody changed them while they were detached; or the journal cannot be read any more, and goes on behind what the
store has (`capture.renewing`).

Every block is compared with the newest write as store and journal have it. That is a look first, with nothing attached.
Then the blocks that differ are written to the volumes once more, as they are there, through the capture layer: so store
and volume are the same again at the next boundary. They lie between the begin and end record of a *gap*, in which no
recovery point is. That it is under way stands in the set's state directory, durably, before the first of them: nothing
is mounted until it has ended, and `up` finishes it.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pgcdp import fsio, log, service, twice
from pgcdp.capture import attach, fingerprint, renewing, same_parts, tracking, volumes
from pgcdp.capture.control import EngineClient
from pgcdp.capture.journal import AppliedMark, Journal
from pgcdp.config import Config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.fsio import free_space
from pgcdp.opening import source_of
from pgcdp.progress import Progress, Report, silent
from pgcdp.records import Gap, RecoveryPoint, Target
from pgcdp.recovery.rewind import Way, check_devices, compare
from pgcdp.recovery.source import Source
from pgcdp.sets import SetPaths
from pgcdp.store.gaps import announce, gap_name
from pgcdp.store.layout import Store
from pgcdp.store.open_views import seen_views
from pgcdp.units import format_size

_log = log.get(__name__)
LOST = "lost"
SPARE_BYTES = 64 << 20
TRACKING_SECONDS = 600.0
"""How long it is waited for that the set has healed of what was tracked."""


@dataclass(frozen=True, slots=True)
class Differences:
    """What the look found: bytes that differ on each volume, by name; `changed`: what the fingerprint says of it.

    `unreadable`: what is wrong with the journal, which begins anew then; `lost`: first and last of the writes that only
    it had. Without any volume: no point can be restored yet, and the first backup image is begun anew.
    """

    volumes: dict[str, int]
    changed: str | None
    unreadable: str | None = None
    lost: tuple[int, int] | None = None


Agree = Callable[[Differences], None]
"""Is told what the look found, and raises to stop it."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Healing that is under way: since when writes are missing, and why; `behind`: the journal is yet to begin anew."""

    since_ns: int
    reason: str = "changed"
    behind: int | None = None

    def save(self, paths: SetPaths) -> None:
        """Make it the set's state, durably."""
        fsio.write_json(paths.heal_state, asdict(self))


def pending(paths: SetPaths) -> Pending | None:
    """What is under way, or was killed. Raises DamageError when that is damaged."""
    try:
        content = fsio.read_json(paths.heal_state)
        return Pending(content["since_ns"], content.get("reason", "changed"), content.get("behind"))
    except FileNotFoundError:
        return None


def heal(config: Config, below: Path, agree: Agree, progress: Report = silent) -> Gap | None:
    """Compare all, ask, and take in what differs; None when nothing does. The set stays down until then.

    Scratch files lie below `below`. Raises PreconditionError where it cannot begin, with nothing changed.
    """
    with fsio.disk_errors(f"mend that, then run pgcdp up {config.name} --heal again"), attach.hold(config.paths):
        attach.refuse_pending(config.paths)
        changed = _refuse_unready(config)
        unreadable = renewing.unreadable(config)
        durable = _marked(config).durable_write
        if _nothing_restorable(config):
            agree(Differences({}, changed, unreadable))
            if config.store.is_dir():
                twice.STATE.remove(config.store / "image")
            if unreadable is not None:
                renewing.begin_anew(config, durable)
            fingerprint.forget(config)
            return None
        source = source_of(config, None) if unreadable is None else _stored(config)
        anew = None if unreadable is None else _anew(config, source, durable)
        behind = durable if anew is None or anew.behind is None else anew.behind
        lost = (behind + 1, durable) if behind < durable else None
        found = replace(_look(config, source, changed, below, progress), unreadable=unreadable, lost=lost)
        differ = sum(found.volumes.values())
        if not differ and lost is None and (anew is None or anew.reason == LOST):
            if anew is not None:
                agree(found)
                _renew(config, durable)
            fingerprint.forget(config)
            return None
        agree(found)
        _refuse_full(config, differ)
        since = fingerprint.detached_ns(config)
        if since is None:
            since = source.place(Target("newest")).time_ns
        config.paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)  # taken over just now, it is not there yet
        doing = anew or Pending(since)
        doing.save(config.paths)
        return _finish(config, doing, below, progress)


def resume(config: Config, below: Path, progress: Report = silent) -> Gap | None:
    """What `up` does first: finish what a kill has left. None when there was nothing."""
    if pending(config.paths) is None:
        return None
    with fsio.disk_errors(f"mend that, then pgcdp up {config.name} finishes it"), attach.hold(config.paths):
        doing = pending(config.paths)
        if doing is None:
            return None
        progress(Progress("finishing the healing of the volumes"))
        mark = _marked(config)
        if doing.behind is None and mark.clean and renewing.unreadable(config) is not None:
            doing = _anew(config, _stored(config), mark.durable_write)
            doing.save(config.paths)
        return _finish(config, doing, below, progress)


def _refuse_unready(config: Config) -> str | None:
    """What the fingerprint says. Raises PreconditionError unless the set was stopped cleanly and is detached."""
    if EngineClient(config.paths.control).alive():
        raise PreconditionError(
            f"the set {config.name} is attached: what is written to its volumes now is captured",
            f"pgcdp down {config.name}, then run this again, if they were changed before",
        )
    same_parts.refuse_other_journal(config)
    if not _marked(config).clean:
        raise PreconditionError(
            f"the set {config.name} was not stopped cleanly: its volumes are behind its journal",
            f"pgcdp up {config.name} replays it; if somebody wrote to the volumes since, pgcdp down {config.name} and "
            "run this again",
        )
    try:
        fingerprint.refuse_changed(config)
    except PreconditionError as told:
        return told.message
    return None


def _marked(config: Config) -> AppliedMark:
    """The applied mark. Raises PreconditionError when there is none: whether the volumes are whole is not known."""
    mark = Journal(config.journal, config.set_id_bytes).applied_mark() if config.journal.is_dir() else None
    if mark is None:
        raise PreconditionError(
            f"{config.journal / 'applied'} is missing: whether the volumes of {config.name} have all that was answered "
            "is not known",
            f"bring the journal's files back; without them, {_restorable(config)}",
        )
    return mark


def _nothing_restorable(config: Config) -> bool:
    """Whether the first backup image is not complete, so that a gap would be in front of everything."""
    if not twice.STORE.exists(config.store) and not _marked(config).released_write:
        return True
    store = Store.open(config.store, config.set_id_bytes)
    return store.baseline is None and not store.interval_numbers()


def _look(config: Config, source: Source, changed: str | None, below: Path, progress: Report) -> Differences:
    point = source.place(Target("newest"))
    backings = [volume.backing for volume in config.volumes]
    _refuse_mounted(config)
    check_devices(source, backings)
    differ = compare(source, point, backings, Way.NONE, below, progress)
    return Differences(dict(zip((volume.name for volume in config.volumes), differ, strict=True)), changed)


def _refuse_mounted(config: Config) -> None:
    for volume in config.volumes:
        status = os.stat(volume.backing)
        devices = [volume.backing] if stat.S_ISBLK(status.st_mode) else list(volumes.loops_over(volume.backing))
        for device in devices:
            places = volumes.mounted_by(device)
            if places:
                raise PreconditionError(
                    f"volume {volume.name} of {config.name} is still mounted at {places[0][2]}",
                    f"umount {places[0][2]}",
                )


def _refuse_full(config: Config, size: int) -> None:
    need, have = 2 * size + SPARE_BYTES, free_space(config.store)  # what is written, and the backward increment of it
    if have < need:
        raise PreconditionError(
            f"the store at {config.store} has {format_size(have)} free, {format_size(need)} are needed to take in what "
            "differs",
            "free space there; nothing was changed",
        )


def _finish(config: Config, doing: Pending, below: Path, progress: Report) -> Gap:
    """From whatever a kill has left to a gap that has ended; nothing is mounted."""
    if doing.behind is not None:
        _renew(config, doing.behind)
        replace(doing, behind=None).save(config.paths)  # from now on the journal may hold something again
    since = doing.since_ns
    name = gap_name(doing.reason, since)
    fingerprint.forget(config)
    client = attach.start_capture(config, progress, captured=lambda: service.start(config))
    _await_end_of_tracking(config, progress)
    done = _healed(config, since)
    if done is None:
        devices = attach.attach_devices(config, progress)
        source = source_of(config, client.next_status())
        check_devices(source, devices)
        announce(source.store, client.cut())
        begin = client.gap_record("begin", name)
        with service.kept(config):
            _take_in(config, begin - 1, devices, below, progress)
        client.gap_record("end", name)
        done = _healed(config, since)
        assert done is not None
    _log.info("a gap of %d blocks: writes %d to %s", done.blocks, done.begin, done.end)
    fsio.remove_durably(config.paths.heal_state)
    return done


def _restorable(config: Config) -> str:
    return f"what the store has can be restored: pgcdp restore --store {config.store} --to-directory DIR"


def _stored(config: Config) -> Source:
    """What the store has, without the journal."""
    return Source(Store.open(config.store, config.set_id_bytes))


def _anew(config: Config, source: Source, durable: int) -> Pending:
    """How the set goes on without what the journal had behind the store's newest write; `durable` was its last one.

    A gap that the store has begun ends then. Raises PreconditionError where it cannot go on.
    """
    newest = source.newest()
    _refuse_views(source.store, newest)
    rewinds, gaps = source.rewinds(), source.gaps()
    restore = _restorable(config)
    renewing.refuse_older(config, durable, newest, f"bring its files back as they were last; {restore}")
    if rewinds and rewinds[-1].end is None:
        raise PreconditionError(
            f"the journal {config.journal} had the end of the rewind in place that begins with write "
            f"{rewinds[-1].begin}: behind that, nothing could be restored any more",
            f"bring its files back; {restore} --target-write {rewinds[-1].begin - 1}",
        )
    if gaps and gaps[-1].end is None:
        return Pending(gaps[-1].since_ns, gaps[-1].reason, newest)
    return Pending(source.place(Target("newest")).time_ns, LOST, newest)


def _refuse_views(store: Store, newest: int) -> None:
    """Numbers behind the store's newest write are given out anew: nobody may look at the writes that had them."""
    lost = [view.write for view in seen_views(store) if view.write > newest]
    if lost:
        raise PreconditionError(
            f"a clone, or another view, of write {max(lost)} is open, which only the journal had",
            "pgcdp clones lists it, pgcdp destroy NAME ends it",
        )


def _renew(config: Config, behind: int) -> None:
    """What the journal says that the store has, is durable there first."""
    store = Store.open(config.store, config.set_id_bytes)
    for file in store.path.glob("incoming/*/*"):
        if file.is_file():
            fsio.sync_file(file)
    if any(since > behind + 1 for since in store.since.values()):
        store.since_at_most(behind + 1)
    aside = renewing.begin_anew(config, behind)
    _log.warning("the journal %s begins anew behind write %d; its old segments: %s", config.journal, behind, aside)


def _await_end_of_tracking(config: Config, progress: Report) -> None:
    """What was tracked comes into the journal first, by the agent: its gap and this one are two."""
    client, deadline = EngineClient(config.paths.control), time.monotonic() + TRACKING_SECONDS
    while (tracked := client.next_status().tracked) is not None:
        if time.monotonic() > deadline:
            raise PreconditionError(
                tracking.told(tracked),
                f"give the journal's disk and the store room, see {config.paths.agent_log}, and run this again",
            )
        progress(Progress(f"bringing {tracked.blocks} blocks that were tracked into the journal"))
        time.sleep(0.2)


def _healed(config: Config, since: int) -> Gap | None:
    """The gap, if its end record is there: a kill may have come right behind it."""
    gaps = source_of(config, EngineClient(config.paths.control).next_status()).gaps()
    return gaps[-1] if gaps and gaps[-1].end is not None and gaps[-1].since_ns == since else None


def _take_in(config: Config, newest: int, devices: list[Path], below: Path, progress: Report) -> None:
    source = source_of(config, EngineClient(config.paths.control).next_status())
    point = RecoveryPoint(newest, None, 0)
    try:
        compare(source, point, devices, Way.TO_CAPTURE, below, progress)
    except OSError as error:
        raise PgcdpError(
            f"taking in what differs on {', '.join(map(str, devices))} failed: {error.strerror or error}",
            f"look at {config.paths.engine_log}; pgcdp up {config.name} goes on with it",
        ) from error
