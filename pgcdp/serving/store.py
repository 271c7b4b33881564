"""The set's store as the agent opens it, or makes it when nothing was captured into one yet."""

from __future__ import annotations

import os
from typing import Any

from pgcdp import twice
from pgcdp.capture.control import EngineStatus
from pgcdp.config import Config
from pgcdp.errors import PreconditionError
from pgcdp.store.layout import Store


def open_store(config: Config, status: EngineStatus) -> Store:
    """Raises PreconditionError when the store is gone that the journal gave writes to."""
    if twice.STORE.exists(config.store):
        return Store.open(config.store, config.set_id_bytes)
    if status.released_write:
        raise PreconditionError(
            f"{config.store} holds no store, but the journal of set {config.name} gave writes up to "
            f"{status.released_write} to it",
            "bring the store's disk back; nothing is captured into a new one",
        )
    return Store.create(config.store, config.name, config.set_id_bytes, list(status.volumes), facts(config))


def without_put_back(store: Store, config: Config, status: EngineStatus) -> Store:
    """The store without what it noted of a volume that was put back at the last moment, with the store perhaps away.

    Settings of before alone do not say so: of a volume that is captured the store knows what nobody else does.
    """
    if len(status.volumes) != len(config.volumes):
        return store
    for volume in store.volumes[len(config.volumes) :]:
        if volume in store.in_use:
            store = store.unmounted(volume.name)
    return store


def facts(config: Config) -> dict[str, Any]:
    """What store.json keeps beside the volumes, so that the store alone is enough to restore from."""
    cluster = config.cluster
    return {
        "pgdata": os.fspath(config.pgdata),
        "cluster": {
            "version": cluster.version,
            "system_identifier": cluster.system_identifier,
            "owner": cluster.owner,
            "port": cluster.port,
        },
        "filesystems": {volume.name: volume.fs for volume in config.volumes},
        "mountpoints": {volume.name: os.fspath(volume.mountpoint) for volume in config.volumes},
    }
