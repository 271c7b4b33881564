"""Whether a set and its store are this machine's, before anything is attached: what `up` asks first."""

from __future__ import annotations

from pgcdp.capture import attach, elsewhere, home
from pgcdp.config import Config
from pgcdp.machine import Place
from pgcdp.progress import Report, silent
from pgcdp.store import lease
from pgcdp.store.layout import Store


def check(config: Config, take_over: bool = False, progress: Report = silent) -> None:
    """Raises PreconditionError when the journal or the store belongs to another set, machine or state root.

    With `take_over` they are this one's from now on; that is refused where another machine still renews its hold of the
    store, or a capture process elsewhere is seen to live (capture/elsewhere.py). A store that is not there is no error:
    capture goes on without.
    """
    here = Place.here(config.root)
    if not (config.store / "store.json").exists():
        if take_over:
            elsewhere.Watch(config).end(progress)
            home.move(config)
        return
    # Whose it is is clear in every store: a key that is away now must not keep production down.
    store = Store.open(config.store, config.set_id_bytes, keyless=not take_over)
    if not take_over:
        lease.refuse_other(store, here)
        return
    with attach.hold(config.paths):
        watch, owner = elsewhere.Watch(config), lease.owner_of(store)
        if owner is None or not owner.place.is_same(here):
            lease.take_over(store, here, progress, watch.look)
        watch.end(progress)
        home.move(config)
