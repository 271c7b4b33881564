"""The two sides of a comparison: the same Postgres on the same filesystem, unprotected and protected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from bench.bulk import fill
from bench.machine import attach, cpu_seconds, peak_rss_mib, run
from pgcdp import api

PLACE = Path("/var/tmp")
BIN = Path("/usr/lib/postgresql/15/bin")
SETTINGS = """
shared_buffers = {shared_buffers}
max_wal_size = 4GB
checkpoint_timeout = {checkpoint_timeout}
listen_addresses = ''
unix_socket_directories = '{sockets}'
port = {port}
"""


@contextmanager
def fresh_root() -> Iterator[Path]:
    """A directory for the clusters of one measurement; it goes afterwards, unless something in it is still mounted."""
    root = Path(tempfile.mkdtemp(prefix="pgcdp-bench-", dir=PLACE))
    root.chmod(0o755)
    shutil.chown(root, "postgres", "postgres")
    try:
        yield root
    finally:
        mounts = ["findmnt", "-rn", "-o", "TARGET", "--submounts", str(root)]
        if not subprocess.run(mounts, capture_output=True, check=False).stdout:
            shutil.rmtree(root)


def tell(result: Mapping[str, Any], as_json: bool) -> None:
    """Print what was measured."""
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:24} {value}")


class Side:
    """A running cluster. `device` is the block device under its filesystem."""

    def __init__(self, root: Path, name: str, port: int, options: dict[str, str]) -> None:
        self.root = root
        self.name = name
        self.port = port
        self.pgdata = root / name
        self.device = ""
        self._settings = SETTINGS.format(port=port, sockets=root, **options)

    def pgbench(self, *options: str) -> str:
        """Run pgbench against it as its owner."""
        return run([str(BIN / "pgbench"), "-h", str(self.root), "-p", str(self.port), *options, "postgres"], "postgres")

    def sql(self, statement: str) -> str:
        """Run one statement."""
        return run([*self.psql(), "-c", statement], "postgres").strip()

    def psql(self) -> list[str]:
        """The command that runs it on this cluster, as its owner."""
        return [str(BIN / "psql"), "-h", str(self.root), "-p", str(self.port), "-qAt", "postgres"]

    def configure_more(self, lines: str) -> None:
        """Further settings, before it is made."""
        self._settings += lines

    def configure(self) -> None:
        """Append the settings of the measurement and start anew with them."""
        with (self.pgdata / "postgresql.conf").open("a") as conf:
            conf.write(self._settings)

    def restart(self) -> None:
        """Stop and start, so that its caches are empty."""
        self.control("stop", "-m", "fast")
        self.control("start", "-l", "/dev/null")

    def control(self, *words: str) -> None:
        """pg_ctl as the owner."""
        command = [str(BIN / "pg_ctl"), "-w", "-t", "300", "-D", str(self.pgdata), *words]
        subprocess.run(command, user="postgres", cwd="/", check=True, stdout=subprocess.DEVNULL)

    def postmaster(self) -> int:
        """Its pid."""
        return int((self.pgdata / "postmaster.pid").read_text().split("\n", 1)[0])


class Plain(Side):
    """The filesystem on a plain loop device over a fully allocated file."""

    def create(self, size: int, fs: str) -> None:
        """Make volume, filesystem and cluster, and start it."""
        image = self.root / f"{self.name}.img"
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        self.device = attach(image)
        run(
            [f"mkfs.{fs}", *(["-q", "-E", "assume_storage_prezeroed=1"] if fs == "ext4" else ["-q", "-K"]), self.device]
        )
        self.pgdata.mkdir()
        run(["mount", "-t", fs, self.device, str(self.pgdata)])
        shutil.rmtree(self.pgdata / "lost+found", ignore_errors=True)
        shutil.chown(self.pgdata, "postgres", "postgres")
        self.pgdata.chmod(0o700)
        run([str(BIN / "initdb"), "-D", str(self.pgdata), "-A", "trust"], "postgres")
        self.configure()
        self.control("start", "-l", "/dev/null")

    def destroy(self) -> None:
        """Stop and take everything away."""
        if (self.pgdata / "postmaster.pid").exists():
            self.control("stop", "-m", "immediate")
        if self.device:
            subprocess.run(["umount", str(self.pgdata)], check=False, capture_output=True)
            subprocess.run(["losetup", "-d", self.device], check=False)


class Protected(Side):
    """The same behind pgcdp, with its agent cutting, storing and moving the image."""

    def create(self, size: int, fs: str, journal_limit: str, gb: float = 0, *words: str) -> None:
        """Make the cluster, with `gb` times 10^9 bytes that do not compress, and protect it; `words` for pgcdp."""
        run(["install", "-d", "-o", "postgres", "-m", "700", str(self.pgdata)])
        run([str(BIN / "initdb"), "-D", str(self.pgdata), "-A", "trust"], "postgres")
        self.configure()
        self.control("start", "-l", "/dev/null")
        if gb:
            fill(self, gb)
        self.pgcdp(
            "protect", "bench", "--pgdata", str(self.pgdata), "--store", str(self.root / "store"), "--size", str(size),
            "--fs", fs, "--journal-limit", journal_limit, "--yes", *words,
        )  # fmt: skip
        self.device = self.status()["volumes"][0]["device"]

    def pgcdp(self, *words: str) -> dict[str, Any]:
        """Run pgcdp; its JSON."""
        environment = {**os.environ, "PGCDP_ROOT": str(self.root / "state")}
        done = subprocess.run(
            [Path(sys.executable).with_name("pgcdp"), *words, "--output", "json"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"pgcdp {' '.join(words)}: {done.stdout}{done.stderr}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def cut_often(self, count: int) -> None:
        """So many intervals with a little in each, without starting a program for each."""
        os.environ["PGCDP_ROOT"] = str(self.root / "state")
        with psycopg.connect(f"host={self.root} port={self.port} user=postgres", autocommit=True) as session:
            for _ in range(count):
                session.execute("insert into pgbench_history (tid) values (0)")
                api.cut("bench")

    def status(self) -> dict[str, Any]:
        """pgcdp status."""
        return self.pgcdp("status", "bench")

    def cost(self) -> dict[str, float]:
        """Processor seconds of capture and agent so far, and bytes captured."""
        status = self.status()
        return {
            "engine_cpu": cpu_seconds(status["engine"]["pid"]),
            "agent_cpu": cpu_seconds(status["agent"]["pid"]),
            "bytes_captured": status["engine"]["bytes_written"],
            "engine_rss_mib": peak_rss_mib(status["engine"]["pid"]),
            "agent_rss_mib": peak_rss_mib(status["agent"]["pid"]),
        }

    def destroy(self) -> None:
        """Take the set down, or what was to become one; the directory goes with the root."""
        if self.device:
            self.pgcdp("down", "bench")
        elif (self.pgdata / "postmaster.pid").exists():
            self.control("stop", "-m", "immediate")
