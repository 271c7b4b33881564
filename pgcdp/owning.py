"""Whether a set and its store are this machine's, before anything is attached: what `up` asks first."""

from __future__ import annotations

from pgcdp import twice
from pgcdp.capture import attach, elsewhere, home, renewing, same_parts
from pgcdp.capture.control import EngineClient
from pgcdp.capture.journal import Journal
from pgcdp.config import Config
from pgcdp.errors import PgcdpError
from pgcdp.machine import Place
from pgcdp.progress import Report, silent
from pgcdp.recovery.source import Source
from pgcdp.store import lease
from pgcdp.store.layout import Store


def check(config: Config, take_over: bool = False, progress: Report = silent) -> None:
    """Raises PreconditionError when the journal or the store belongs to another set, machine or state root, or when
    the journal is older than the store.

    With `take_over` they are this one's from now on; that is refused where another machine still renews its hold of the
    store, or a capture process elsewhere is seen to live (capture/elsewhere.py). A store that is not there is no error:
    capture goes on without.
    """
    here = Place.here(config.root)
    if not twice.STORE.exists(config.store):
        if take_over:
            elsewhere.Watch(config).end(progress)
            _move(config)
        return
    # Whose it is is clear in every store: a key that is away now must not keep production down.
    store = Store.open(config.store, config.set_id_bytes, keyless=not take_over)
    if not take_over:
        lease.refuse_other(store, here)
        _refuse_older_journal(config, store)
        return
    _refuse_older_journal(config, store)
    with attach.hold(config.paths):
        watch, owner = elsewhere.Watch(config), lease.owner_of(store)
        if owner is None or not owner.place.is_same(here):
            lease.take_over(store, here, progress, watch.look)
        watch.end(progress)
        _move(config)


def _move(config: Config) -> None:
    home.move(config)
    same_parts.forget(config.paths)  # what this machine knew of it may be from before it went elsewhere


def _refuse_older_journal(config: Config, store: Store) -> None:
    """Raises PreconditionError when capture is to start on a journal that ends before the store does."""
    if EngineClient(config.paths.control).alive():
        return
    try:
        held = Source(store, trusting=True).newest()
        ended = _end_of_journal(config, held)
    except (PgcdpError, OSError):  # that is told later; without its key a store may not be readable
        return
    if ended is not None:
        hint = (
            f"bring its files back as they were last; what the store has: pgcdp restore --store {config.store} "
            f"--to-directory DIR. If the volumes were set back with it: pgcdp unprotect {config.name} --unstored, "
            "then protect with another --store"
        )
        renewing.refuse_older(config, ended, held, hint)


def _end_of_journal(config: Config, enough: int) -> int | None:
    """Its last write, or one behind `enough`; None when there is no journal."""
    journal = Journal(config.journal, config.set_id_bytes)
    mark = journal.applied_mark()
    if mark is None:
        return None
    ended = mark.durable_write
    if ended < enough:
        for run in journal.batches(ended, None, mark.position if mark.position.segment else None):
            ended = run.last_write
            if ended >= enough:
                break
    return ended
