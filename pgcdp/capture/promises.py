"""Whether the promise would hold for a cluster: before it is protected, by `pgcdp check` and protect."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pgcdp import proc
from pgcdp.capture import disks, kernel
from pgcdp.config import ClusterConfig, Config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.postgres import cluster, promise
from pgcdp.postgres.session import Dsn
from pgcdp.records import Remark


def of_cluster(pgdata: Path, facts: ClusterConfig, running: bool) -> Iterator[Remark]:
    """Its settings and states. Raises PreconditionError when it runs and does not answer, or cannot be asked."""
    user = proc.user_named(facts.owner)
    if running:
        yield from promise.running(Dsn(Path(facts.socket_directory), facts.port, facts.owner, user), pgdata)
        return
    state = cluster.read_control(pgdata).state
    if state is None:
        raise DamageError(f"pg_control in {pgdata} has a state that is not known", "start the cluster once, then again")
    yield from promise.at_rest(
        pgdata, facts.version, state, lambda name: cluster.ask_setting(facts.command_line, name, user)
    )


def of_places(config: Config) -> Iterator[Remark]:
    """The machine, and where store, journal and volumes will lie; none of them need exist."""
    yield from kernel.release_remarks(os.uname().release)
    yield from kernel.direct({"journal": nearest_existing(config.journal)})
    backings = {volume.name: nearest_existing_file(volume.backing) for volume in config.volumes}
    yield from disks.apart(nearest_existing(config.store), nearest_existing(config.journal), backings)


def refuse(remarks: Iterable[Remark]) -> list[Remark]:
    """The warnings among them. Raises PreconditionError for the first failure."""
    warnings = []
    for remark in remarks:
        if remark.level == "failure":
            raise PreconditionError(f"{remark.name}: {remark.detail}", remark.hint)
        if remark.level == "warning":
            warnings.append(remark)
    return warnings


def nearest_existing(place: Path) -> Path:
    """The directory on whose filesystem `place` is, or would be made."""
    while not place.is_dir():
        place = place.parent
    return place


def nearest_existing_file(place: Path) -> Path:
    """The same for an image file or a block device."""
    return place if place.exists() else nearest_existing(place.parent)
