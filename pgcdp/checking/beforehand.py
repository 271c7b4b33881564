"""A cluster that is not protected yet: would the promise hold? `pgcdp check --pgdata DIR`; protect has the same rules.

Nothing is changed, and nothing needs a set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pgcdp import proc
from pgcdp.capture import checks, disks, kernel, promises
from pgcdp.capture.outside import find_outside
from pgcdp.checking.finding import Finding, Step, failed, of_remarks, passed, run, warned
from pgcdp.config import set_of_pgdata
from pgcdp.errors import PgcdpError
from pgcdp.postgres import cluster
from pgcdp.progress import Report
from pgcdp.records import Remark
from pgcdp.sets import set_paths

ANY_NAME = "new"
"""Of the set that would be: its journal lies where every set's does."""


def examine(pgdata: Path, store: Path | None, journal: Path | None, progress: Report) -> list[Finding]:
    """All that can be known. `store` and `journal` need not exist. Raises nothing: what is wrong is in the list."""
    real = Path(os.path.realpath(pgdata))
    journal = journal or set_paths(ANY_NAME).journal
    steps: list[Step] = [
        ("privileges", _privileges),
        ("cluster", lambda: _cluster(real)),
        ("settings", lambda: of_remarks(_promises(real))),
        ("data outside the directory", lambda: _outside(real)),
        ("machine", lambda: _machine(journal)),
        ("places", lambda: _places(real, store, journal)),
    ]
    return run(steps, progress)


def _privileges() -> Iterator[Finding]:
    proc.check_root()
    yield passed("privileges", "root")


def _cluster(pgdata: Path) -> Iterator[Finding]:
    found = cluster.inspect(pgdata)
    holder = set_of_pgdata(pgdata)
    if holder is not None:
        yield failed("cluster", f'{pgdata} is already protected by the set "{holder}"', f"pgcdp check {holder}")
        return
    state = "does not run" if found.postmaster is None else "runs"
    yield passed("cluster", f"PostgreSQL {found.major}, belongs to {found.user.name}, {state}")


def _promises(pgdata: Path) -> Iterator[Remark]:
    facts, running = checks.facts_of(pgdata, None, set_paths(ANY_NAME).state)
    yield from promises.of_cluster(pgdata, facts, running)


def _outside(pgdata: Path) -> Iterator[Finding]:
    """What protect must be told of, since nobody would capture it otherwise."""
    found = find_outside(pgdata, [])
    for each in found:
        option = "--wal-volume SIZE" if each.name == "pg_wal" else None
        if each.name.startswith("pg_tblspc/"):
            option = f"--tablespace {each.name.removeprefix('pg_tblspc/')}=SIZE"
        hint = f"give protect {option}" if option else "stop the cluster and move it into the data directory"
        yield warned("data outside the directory", f"{each.name} lies in {each.place}", hint)
    if not found:
        yield passed("data outside the directory", "none")


def _machine(journal: Path) -> Iterator[Finding]:
    yield from of_remarks(kernel.release_remarks(os.uname().release))
    yield from of_remarks(kernel.doors())
    try:
        checks.check_programs({"ext4"})
    except PgcdpError as error:
        yield failed("programs", error.message, error.hint)
    else:
        yield passed("programs", "all there")
    yield from of_remarks(kernel.direct({"journal": promises.nearest_existing(journal)}))


def _places(pgdata: Path, store: Path | None, journal: Path) -> Iterator[Finding]:
    """Where the store and the journal would lie."""
    below = promises.nearest_existing(journal)
    yield from of_remarks(_not_in(pgdata, "journal", journal))
    if store is None:
        yield passed("disks", "not looked at: --store DIR tells where the store would lie")
        return
    yield from of_remarks(_not_in(pgdata, "store", store))
    yield from of_remarks(
        disks.apart(promises.nearest_existing(store), below, {"of the cluster": promises.nearest_existing(pgdata)})
    )


def _not_in(pgdata: Path, what: str, place: Path) -> Iterator[Remark]:
    if Path(os.path.realpath(place)).is_relative_to(pgdata):
        yield Remark(
            f"place of the {what}", "failure", f"{place} is inside the data directory, which will be captured",
            f"choose a --{what} elsewhere, best on another disk",
        )  # fmt: skip
    else:
        yield Remark(f"place of the {what}", "ok", os.fspath(place))
