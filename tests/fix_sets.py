"""Real protected sets: `make_set(binaries, fs=..., ...)` gives a `ProtectedSet` that captures, with its agent running.

Each has a PGCDP_ROOT of its own. At the end it is taken down, whatever state it is in, its logs are
read, and a warning or error that the test did not allow fails it.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgcdp import api, keys, opening, service
from pgcdp.capture import attach, children, held, holder
from pgcdp.capture.attach import kill_and_wait
from pgcdp.capture.control import EngineClient
from pgcdp.capture.volumes import backing_bytes
from pgcdp.config import Config, load_config
from pgcdp.errors import PgcdpError
from pgcdp.postgres import session
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import RecoveryPoint, Target
from pgcdp.recovery import clone, sandbox
from pgcdp.recovery.restore import remove
from pgcdp.recovery.sandbox import Sandbox
from pgcdp.recovery.scratch import elsewhere, mounted
from pgcdp.recovery.source import Source
from tests.beside import repeated
from tests.data_directory import configure, new_data_directory
from tests.fix_engine import LATE, NOT_ALLOWED, _may_flush, _plain_program
from tests.fix_keys import ENCRYPT_ALL
from tests.fix_postgres import bad_lines, postgres_user
from tests.moments import scratch_below
from tests.scratch import SCRATCH, scratch_directory
from tests.waiting import wait_until

PORT = 5432
KILLED = (
    r"the engine at .* ended before it answered",
    r"no engine answers at",
    r"no checkpoint: ",
    r"no look at the catalogs: ",
    r"no map of files: .*Errno",
    r"it is not known whether data lies outside of the volumes: .*Errno",
)
"""What an agent may say when the engine or Postgres was killed under it."""
_DOWN = (
    r"(shutting down|administrator command|onnection (is|was) closed|onnection re(set|fused)|connection_lost"
    r"|has ended the connection|Broken pipe|No such file|starting up|not yet accepting connections)"
)
STOPPED = (
    rf"no (checkpoint|look at the catalogs): .*{_DOWN}",
    r"ERROR:  canceling statement due to user request",
)
"""What an agent says that was just looking, or asking for a checkpoint, when Postgres was told to stop or came back: at
whichever moment of that. And what Postgres says when the agent was told to stop as it asked."""
BUSY = r"the image waits at boundary \d+ for views of "
"""What an agent says of a view that takes more than a second to answer. Of one that does not, that it was fenced."""
LEFT = r"FATAL:  connection to client lost"
"""What Postgres says that was just answering somebody who was killed, or told to end."""
CUT_OFF = (
    r"(PANIC|FATAL|ERROR|WARNING):  .*"
    r"(Input/output error|Read-only file system|Transport endpoint|read only \d+ of \d+ bytes)"
)
"""What Postgres says that was writing, or reading, as the devices below it went away."""


@dataclass
class ProtectedSet:
    """A cluster behind capture below `root`."""

    root: Path
    binaries: Binaries
    name: str = "main"
    fs: str = "ext4"
    allowed: list[str] = field(default_factory=list)
    store_at: Path | None = None

    @property
    def config(self) -> Config:
        return load_config(self.name)

    @property
    def engine(self) -> EngineClient:
        return EngineClient(self.config.paths.control)

    @property
    def sockets(self) -> Path:
        return self.root / "s"

    @property
    def pgdata(self) -> Path:
        return self.root / "pgdata"

    @property
    def store(self) -> Path:
        return self.store_at or self.root / "store"

    def place(self, settings: Mapping[str, str]) -> dict[str, str]:
        """These settings with those of where it answers."""
        own = {"unix_socket_directories": str(self.sockets), "port": str(PORT), "listen_addresses": ""}
        return own | dict(settings)

    def protect(
        self, *, size: int | None, settings: dict[str, str], initdb: Sequence[str] = (), **options: Any
    ) -> None:
        """A new cluster behind capture, with checksums and no TCP; returns when the first boundary is there."""
        if ENCRYPT_ALL:
            options.setdefault("encrypt_key_file", Path(os.environ[keys.FILE_VARIABLE]))
        new_data_directory(self.binaries, self.pgdata, *initdb)
        configure(self.pgdata, self.place(settings))
        api.protect(
            self.name, self.pgdata, self.store, size=size, fs=self.fs, yes=True, bindir=self.binaries.directory,
            **options,
        )  # fmt: skip

    def address(self) -> session.Dsn:
        return session.Dsn(self.sockets, PORT)

    def dsn(self, database: str = "postgres") -> str:
        return self.address().text(database)

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn(database), autocommit=True)

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement; its rows."""
        with self.connect() as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def program(self, name: str, *arguments: str) -> list[str]:
        """The command line of one of Postgres's client programs against this cluster."""
        return [str(self.binaries.path(name)), "-h", str(self.sockets), "-p", str(PORT), "-U", "postgres", *arguments]

    def pgbench(self, *arguments: str) -> str:
        """Run pgbench to its end."""
        command = self.program("pgbench", *arguments, "postgres")
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout

    def status(self) -> dict[str, Any]:
        return api.status(self.name)

    def durable(self) -> int:
        """The newest durable write, once everything that was sent is durable."""
        return self.engine.cut()

    def source(self) -> Source:
        """The store with the journal, as `pgcdp restore` opens it."""
        return opening.open_source(self.name, None)

    @contextmanager
    def running_at(self, point: Target | RecoveryPoint) -> Iterator[Sandbox]:
        """Postgres on a recovery point, in a sandbox."""
        source = self.source()
        if isinstance(point, Target):
            point = source.resolve(point)
        with (
            mounted(source, point, scratch_below(self.root)) as pgdata,
            sandbox.start(
                pgdata, source.settings(point), parent=pgdata.parent, binaries=self.binaries,
                elsewhere=elsewhere(source, point, pgdata),
            ) as box,
        ):  # fmt: skip
            yield box

    def verify(self, write: int, **options: Any) -> dict[str, Any]:
        """`pgcdp verify --target-write`."""
        result: dict[str, Any] = api.verify(self.name, Target("write", write), **options)["results"][0]
        return result

    def kill_engine(self) -> None:
        """kill -9 of the capture process and its holder: what is above sees I/O errors."""
        self.allowed += [CUT_OFF, *KILLED]
        held.cut_off(self.config.paths)

    def kill_capture(self) -> None:
        """kill -9 of the capture process alone: its holder keeps the connection for the next one."""
        kill_and_wait(self.engine.status().pid)

    def kill_holder(self) -> None:
        """kill -9 of the holder alone."""
        holder.end(self.config.paths)

    def capturing(self) -> bool:
        """Whether a capture process serves the volumes now."""
        return self.engine.alive()

    def agent_pid(self) -> int:
        """The agent's process id; AgentGone when none runs."""
        return int(service.ask(self.config.paths, "status")["pid"])

    def kill_agent(self) -> None:
        """kill -9 of the agent."""
        self.allowed.append(LEFT)
        kill_and_wait(self.agent_pid())
        reap()

    def kill_both(self) -> None:
        """kill -9 of agent, holder and capture process, one right after the other."""
        self.allowed += [CUT_OFF, LEFT]
        agent = self.agent_pid()
        os.kill(agent, signal.SIGKILL)
        held.cut_off(self.config.paths)
        kill_and_wait(agent)
        reap()

    def up(self) -> None:
        api.up(self.name)

    def amcheck(self) -> None:
        """pg_amcheck of all databases, heap against every index."""
        words = self.program("pg_amcheck", "--all", "--install-missing", "--heapallindexed", "--no-strict-names")
        done = subprocess.run(words, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def restored(self, target: Target) -> list[Path]:
        """The volumes at a target, as `restore --to-image` makes them; the caller removes them with `root`."""
        place = self.root / f"image-{target.kind}-{target.value}"
        remove(place)
        api.restore(self.name, target, to_image=place)
        names = [volume.name for volume in self.config.volumes]
        return [place] if len(names) == 1 else [place / f"{name}.img" for name in names]

    def assert_volume_is_newest(self) -> None:
        """The newest write restored from store and journal is, byte for byte, what the volumes hold. Call it `down`."""
        images = self.restored(Target("newest"))
        for volume, image in zip(self.config.volumes, images, strict=True):
            different = first_difference(volume.backing, image, volume.bytes)
            assert different is None, f"volume {volume.name} differs from store and journal at byte {different}"
            image.unlink()

    def wait_following(self) -> None:
        """Until the agent follows, without an error."""

        def follows() -> bool:
            try:
                state = service.ask(self.config.paths, "status")
            except service.AgentGone:
                return False
            return state["phase"] == "following" and not state["error"]

        wait_until(follows, timeout=120, what="the agent follows")

    def destroy(self) -> None:
        """Everything away, whatever state it is in."""
        with suppress(PgcdpError):
            config = self.config
            with suppress(PgcdpError):
                service.stop(config, 60)
            with suppress(PgcdpError):
                self.kill_agent()  # else it would write into what is removed here
            attach.discard(config)
        reap()
        shutil.rmtree(self.root)

    def complaints(self) -> list[str]:
        """Unexpected lines in the logs of engine, agent and Postgres."""
        with suppress(PgcdpError):
            paths = self.config.paths
            allowed = [*self.allowed, *STOPPED, *LATE, BUSY, *(() if _may_flush() else NOT_ALLOWED)]
            found = []
            for log in (paths.engine_log, paths.agent_log):
                text = log.read_text(errors="replace") if log.exists() else ""
                found += [entry for entry in _entries(text) if _complains(entry, allowed)]
            log = self.config.cluster.log_file
            if log.exists():
                lines = bad_lines(log.read_text(errors="replace"), self.allowed)
                found += [line for line in lines if _complains(line, allowed, r"")]
            return found
        return []


def _entries(log: str) -> list[str]:
    """A log's lines, each with what is written below it without a time: a traceback."""
    return re.split(r"\n(?=\d{4}-\d\d-\d\dT)", log.rstrip("\n"))


def _complains(entry: str, allowed: Sequence[str], bad: str = r"\b(warning|WARNING|error|ERROR)\b") -> bool:
    lines = [line for line in entry.splitlines() if re.search(bad, line)]
    return any(not any(re.search(pattern, line) for pattern in allowed) for line in lines)


_PIECE = 4 << 20


def first_difference(volume: Path, image: Path, size: int | None = None) -> int | None:
    """Offset of the first block in which a backing and an image differ; None when they are equal.

    `size`: bytes of the volume, if not all of the backing: that may have less than a block more, no part of it.
    """
    size = backing_bytes(volume) if size is None else size
    if image.stat().st_size != size or not size <= backing_bytes(volume) < size + 4096:
        return min(size, image.stat().st_size, backing_bytes(volume))
    zeros = bytes(_PIECE)
    direct = os.open(volume, os.O_RDONLY | os.O_DIRECT)
    sparse = os.open(image, os.O_RDONLY)
    try:
        with mmap.mmap(-1, _PIECE) as memory:
            for at in range(0, size, _PIECE):
                count = min(os.preadv(direct, [memory], at), size - at)
                other = zeros[:count] if _data_from(sparse, at, size) >= at + count else os.pread(sparse, count, at)
                piece = memory[:count]
                if piece != other:
                    blocks = range(0, count, 4096)
                    return next(at + i for i in blocks if piece[i : i + 4096] != other[i : i + 4096])
    finally:
        os.close(direct)
        os.close(sparse)
    return None


def assert_equal(files: Sequence[Path], images: Sequence[Path], what: str) -> None:
    """Each backing or volume of a view is its image, byte for byte."""
    for file, image in zip(files, images, strict=True):
        different = first_difference(file, image)
        assert different is None, f"{what}: volume {file.name} differs at byte {different}"


def _data_from(fd: int, at: int, size: int) -> int:
    """Where the next data begins: before it are holes."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:
        return size


def reap() -> None:
    """Collect ended agents and engines, so that none stays a zombie; the test's own children are left to it."""
    for child in service._children:
        child.poll()
    children.reap()


def cutting(found: ProtectedSet) -> AbstractContextManager[None]:
    """Intervals are cut all the time inside."""
    return repeated(lambda: api.cut(found.name), pause=0.3)


MakeSet = Callable[..., ProtectedSet]


@pytest.fixture
def make_set(own_root: Callable[[Path], None]) -> Iterator[MakeSet]:
    """make_set(binaries, fs="ext4", size=512 << 20, settings={...}, cut=(...), journal_limit=...)

    `below`: where the set's own directory is made; `store_at`: the store, when it is not in that.
    """
    made: list[ProtectedSet] = []

    def make(
        binaries: Binaries,
        *,
        fs: str = "ext4",
        size: int | None = 768 << 20,
        settings: dict[str, str] | None = None,
        allowed: Sequence[str] = (),
        protect: bool = True,
        below: Path = SCRATCH,
        store_at: Path | None = None,
        **options: Any,
    ) -> ProtectedSet:
        root = scratch_directory("set", below)
        user = postgres_user()
        own_root(root / "state")
        found = ProtectedSet(root, binaries, fs=fs, allowed=list(allowed), store_at=store_at)
        made.append(found)
        found.sockets.mkdir(mode=0o700)
        os.chown(found.sockets, user.uid, user.gid)
        if protect:
            found.protect(size=size, settings=settings or {}, **{"journal_limit": 2 << 30, **options})
        return found

    yield make
    complaints = []
    for each in made:
        own_root(each.root / "state")
        complaints += each.complaints()
        each.destroy()
    assert complaints == [], "in the logs"


@pytest.fixture
def own_root() -> Iterator[Callable[[Path], None]]:
    """Sets PGCDP_ROOT and PGCDP_ENGINE for this process and its children."""
    before = {name: os.environ.get(name) for name in ("PGCDP_ROOT", "PGCDP_ENGINE")}

    def choose(root: Path) -> None:
        root.mkdir(mode=0o755, exist_ok=True)
        os.environ["PGCDP_ROOT"] = str(root)
        os.environ["PGCDP_ENGINE"] = str(_plain_program())

    yield choose
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def no_clone_stays(own_root: Any) -> Iterator[None]:
    """Destroys what a test that failed has left."""
    yield
    for each in clone.find_all(Path(os.environ.get("PGCDP_ROOT", "/"))):
        clone.destroy(each.place)
