"""Fixtures for pytest: a protected Postgres that tests rewind to a mark, and clones of any point of it.

    def test_an_order_can_be_cancelled(pgcdp_cluster, pgcdp_rewind):
        pgcdp_rewind("filled")               # made by a fixture of yours with pgcdp_cluster.mark("filled")
        with psycopg.connect(pgcdp_cluster.dsn()) as connection: ...

Needs root, as pgcdp itself does. The executables are those that pytest-postgresql is set to use, if it is installed and
they exist, else the newest ones that are found; `pgcdp_size` and `pgcdp_settings` in the ini file say how large the
volume is and which settings Postgres gets. All of it is gone after the session.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pgcdp.postgres.cluster import Binaries
    from pgcdp.proc import User

SET = "pytest"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the ini file."""
    parser.addini("pgcdp_size", "size of the volume that holds the cluster of pgcdp_cluster", default="2G")
    parser.addini("pgcdp_settings", "settings of that cluster, NAME = VALUE, one a line", type="linelist", default=[])


class Cluster:
    """A protected cluster. `root` is the PGCDP_ROOT below which pgcdp's own files lie."""

    def __init__(self, directory: Path, role: str) -> None:
        self.directory = directory
        self.root = directory / "state"
        self.role = role
        self.marks: list[str] = []

    def dsn(self, database: str = "postgres") -> str:
        """A libpq connection string."""
        return f"host={self.directory / 'sockets'} port=5432 user={self.role} dbname={database}"

    def mark(self, name: str) -> int:
        """A point that `rewind` can come back to; the write that it is."""
        from pgcdp import api

        write: int = api.mark(SET, name)["write"]
        self.marks.append(name)
        return write

    def rewind(self, name: str) -> dict[str, Any]:
        """Bring the cluster back to the newest mark of that name. Sessions end; the point is not proven each time."""
        from pgcdp import api
        from pgcdp.records import Target

        return api.rewind(SET, Target("name", name=name), agree=lambda resolved: None, prove=False)

    def clone(self, name: str | None = None, /, **how: Any) -> dict[str, Any]:
        """A running Postgres at a mark (None: as the cluster is now), as `pgcdp clone` tells it ("dsn", "name", ...).

        Destroy it with `destroy`. `how` are further arguments of `pgcdp.cloning.clone`.
        """
        from pgcdp import api
        from pgcdp.records import Target

        target = Target("newest") if name is None else Target("name", name=name)
        return api.clone(SET, how.pop("target", target), **how)

    def destroy(self, name: str) -> None:
        """End a clone."""
        from pgcdp import api

        api.destroy(name)


@pytest.fixture(scope="session")
def pgcdp_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A protected cluster for the whole session: `dsn()`, `mark(name)`, `rewind(name)`, `clone(name)`."""
    from pgcdp import api
    from pgcdp.capture import volumes
    from pgcdp.errors import PgcdpError
    from pgcdp.proc import user_named
    from pgcdp.units import parse_size

    owner = user_named("postgres")
    binaries = _executables(request.config, owner)
    directory = Path(tempfile.mkdtemp(prefix="pgcdp-pytest-", dir="/var/tmp"))
    directory.chmod(0o755)
    cluster = Cluster(directory, "postgres")
    before = os.environ.get("PGCDP_ROOT")
    os.environ["PGCDP_ROOT"] = str(cluster.root)
    try:
        cluster.root.mkdir()
        (directory / "sockets").mkdir(mode=0o700)
        os.chown(directory / "sockets", owner.uid, owner.gid)
        settings = {
            "unix_socket_directories": str(directory / "sockets"),
            "port": "5432",
            "listen_addresses": "",
            **_settings(request.config),
        }
        api.protect(
            SET,
            directory / "data",
            directory / "store",
            size=parse_size(request.config.getini("pgcdp_size")),
            journal_limit=512 << 20,
            initdb=True,
            yes=True,
            version=binaries.major,
            bindir=binaries.directory,
            initdb_options=("--auth=trust",),
            settings=tuple(settings.items()),
        )
        try:
            yield cluster
        finally:
            for each in api.clones()["clones"]:
                with suppress(PgcdpError):
                    api.destroy(each["name"])
            api.down(SET)
    finally:
        if before is None:
            del os.environ["PGCDP_ROOT"]
        else:
            os.environ["PGCDP_ROOT"] = before
        if not volumes.mounts_below(directory):  # else it would be emptied, not removed
            shutil.rmtree(directory)


@pytest.fixture
def pgcdp_rewind(pgcdp_cluster: Cluster) -> Callable[[str], dict[str, Any]]:
    """`pgcdp_rewind(name)` brings the cluster back to a mark."""
    return pgcdp_cluster.rewind


@pytest.fixture
def pgcdp_clone(pgcdp_cluster: Cluster) -> Iterator[Callable[..., dict[str, Any]]]:
    """`pgcdp_clone(name)` opens a running Postgres at a mark; it is gone after the test."""
    from pgcdp.errors import TargetError

    made: list[str] = []

    def open_clone(name: str | None = None, /, **how: Any) -> dict[str, Any]:
        told = pgcdp_cluster.clone(name, **how)
        made.append(told["name"])
        return told

    yield open_clone
    for name in made:
        with suppress(TargetError):  # the test itself has destroyed it
            pgcdp_cluster.destroy(name)


def _executables(config: pytest.Config, user: User) -> Binaries:
    from pgcdp.errors import PreconditionError
    from pgcdp.postgres.cluster import NEWEST, OLDEST, Binaries, find_binaries, version_of

    chosen = config.getoption("postgresql_exec", default=None)
    with suppress(ValueError):
        chosen = chosen or config.getini("postgresql_exec")
    if chosen and Path(chosen).exists():
        directory = Path(chosen).parent
        major = version_of(directory, user)
        if major is not None:
            return Binaries(directory, major)
    for major in range(NEWEST, OLDEST - 1, -1):
        with suppress(PreconditionError):
            return find_binaries(major, user=user)
    raise PreconditionError("no PostgreSQL is installed", "apt-get install postgresql-15, or set postgresql_exec")


def _settings(config: pytest.Config) -> dict[str, str]:
    pairs = (line.partition("=") for line in config.getini("pgcdp_settings"))
    return {name.strip(): value.strip() for name, _, value in pairs}
