"""A house: one Postgres 15 cluster and a root for sets, in a scratch directory of their own, as users have them.

For what becomes of a cluster that was there before: put behind capture, taken out again, killed on the way.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from pgcdp import proc
from pgcdp.capture import held, protect, volumes
from pgcdp.capture.checks import ProtectRequest
from pgcdp.capture.control import EngineClient
from pgcdp.postgres import cluster
from pgcdp.sets import list_sets, set_paths
from tests.data_directory import new_data_directory
from tests.failing_disks import unmount
from tests.fix_engine import LATE

MIB = 1 << 20
ALLOWED = re.compile(r"cannot become an I/O flusher|cannot lock memory|out-of-memory killer")


@dataclass
class House:
    """A root for sets and one Postgres 15 cluster that runs, in a scratch directory of their own."""

    root: Path
    pgdata: Path
    port: int
    user: proc.User
    argv: tuple[str, ...]
    allowed: list[str] = field(default_factory=list)

    def request(self, **changes: object) -> ProtectRequest:
        values: dict[str, object] = {
            "name": "main",
            "pgdata": self.pgdata,
            "store": self.root / "store",
            "size": 384 * MIB,
            "journal_limit": 128 * MIB,
            "segment_size": 8 * MIB,
            **changes,
        }
        return ProtectRequest(**values)  # type: ignore[arg-type]

    @property
    def log(self) -> Path:
        return self.root / "postgres.log"

    def connect(self) -> psycopg.Connection[tuple[int, ...]]:
        return psycopg.connect(
            host=str(self.root / "socket"), port=self.port, user="postgres", dbname="postgres", autocommit=True
        )

    def count(self) -> int:
        with self.connect() as session:
            row = session.execute("SELECT count(*) FROM ledger").fetchone()
        assert row is not None
        return row[0]

    def postmaster(self) -> cluster.Postmaster | None:
        return cluster.find_postmaster(self.pgdata)

    def start(self) -> None:
        cluster.start(self.argv, self.pgdata, self.user, self.log)

    def picture(self) -> list[str]:
        """Everything in the scratch directory but the cluster's content, and who runs on it."""
        running = self.postmaster()
        names = [str(path) for path in self.root.rglob("*") if self.pgdata not in path.parents]
        ours_or_of_any_session = (".lock", "/run/pgcdp", "/run", "/sets", "/pg_internal.init")
        names = [name for name in names if not name.endswith(ours_or_of_any_session)]
        return [*sorted(names), str(running.pid if running else None)]


@pytest.fixture
def house(scratch: Path, engine_program: Path, monkeypatch: pytest.MonkeyPatch, free_port: int) -> Iterator[House]:
    monkeypatch.setenv("PGCDP_ROOT", str(scratch / "sets"))
    monkeypatch.setenv("PGCDP_ENGINE", str(engine_program))
    user = proc.user_named("postgres")
    (scratch / "socket").mkdir(mode=0o700)
    os.chown(scratch / "socket", user.uid, user.gid)
    binaries = cluster.find_binaries(15)
    new_data_directory(binaries, scratch / "pg")
    options = ("-c", f"port={free_port}", "-c", f"unix_socket_directories={scratch}/socket", "-c", "listen_addresses=")
    own = ("-c", "autovacuum=off", "-c", "cluster_name=kept as it was")  # autovacuum makes files: nothing else may have
    argv = cluster.command_line(binaries, scratch / "pg", *options, *own)
    house = House(scratch, scratch / "pg", free_port, user, argv)
    house.start()
    with house.connect() as session:
        session.execute("CREATE TABLE ledger (id bigint PRIMARY KEY)")
        session.execute("INSERT INTO ledger SELECT generate_series(1, 1000)")
    yield house
    _take_down(house)
    complaints = []
    for log in scratch.glob("sets/var/lib/pgcdp/*/engine.log"):
        lines = log.read_text(errors="replace").splitlines()
        allowed = re.compile("|".join([ALLOWED.pattern, *LATE, *house.allowed]))
        complaints += [line for line in lines if re.search(r"\b(warning|error)\b", line) and not allowed.search(line)]
    assert complaints == []


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port of its own, below those that the kernel gives to who asks for any."""
    return 20000 + os.getpid() % 12000


def _take_down(house: House) -> None:
    """Whatever a test left: every Postgres process, mount, loop device and engine of the scratch directory."""
    sets = [set_paths(place.name) for place in house.root.glob("sets/run/pgcdp/*/")]
    for paths in sets:
        if not EngineClient(paths.control).alive():
            held.cut_off(paths)  # else what is above its holder waits
    cluster.kill_leftovers(house.pgdata)
    for mount in reversed(volumes.mounts_below(house.root)):
        if mount.mountpoint.name != "fuse":
            unmount(mount.mountpoint)
    for device in volumes.loops_over(house.root):
        volumes.detach_loop(device)
    for paths in sets:
        held.cut_off(paths)
    for mount in volumes.mounts_below(house.root):
        volumes.unmount_lazily(mount.mountpoint)


def assert_as_before(house: House) -> None:
    """The cluster runs on plain files with its old command line, and nothing else is left."""
    running = house.postmaster()
    assert running is not None
    assert running.argv == house.argv
    assert house.count() == 1000
    assert volumes.mounts_below(house.root) == []
    assert volumes.loops_over(house.root) == {}
    assert list_sets() == []
    assert [path.name for path in house.root.iterdir() if ".pgcdp-" in path.name] == []
    assert not list((house.root / "sets").rglob("*.img"))
    assert not list((house.root / "sets").rglob("*.seg"))


RUNNER = """
import os, pickle, signal, sys
from pgcdp import config
from pgcdp.capture import protect

verb, step, nth, request = sys.argv[1:]
seen = 0

def report(progress):
    global seen
    seen += progress.step == step
    if seen == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)

if verb == "protect":
    protect.protect(pickle.loads(bytes.fromhex(request)), report)
else:
    protect.unprotect(config.load_config("main"), report)
"""


def run_until(verb: str, step: str, request: ProtectRequest, nth: int = 1) -> None:
    """Run protect or unprotect in a process of its own that is killed when it reports this step the `nth` time."""
    command = [sys.executable, "-c", RUNNER, verb, step, str(nth), pickle.dumps(request).hex()]
    paths = os.pathsep.join([str(Path(protect.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
