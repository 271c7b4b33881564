"""Whether a postmaster would find its port free: on its Unix sockets and on its addresses, as it looks itself."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgcdp import proc
from pgcdp.postgres import cluster

SETTINGS = ("port", "unix_socket_directories", "listen_addresses")


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a cluster listens, or would."""

    port: int
    directories: tuple[Path, ...]
    addresses: tuple[str, ...]

    @classmethod
    def of_values(cls, port: str, directories: str, addresses: str) -> Listening:
        """From the three settings as Postgres gives them."""
        return cls(int(port), tuple(map(Path, _words(directories))), _words(addresses))

    def taken(self) -> str | None:
        """Who has one of its places, in words; None when all are free. Addresses that do not exist are passed over."""
        for directory in self.directories:
            place = directory / f".s.PGSQL.{self.port}"
            if _answers(place):
                return f"{_owner(place)} listens at {place}"
        for address in self.addresses:
            if _bound(address, self.port):
                return f"another program listens on TCP port {self.port} of {address}"
        return None


def of_cluster(argv: Sequence[str], user: proc.User) -> Listening:
    """Of a cluster that does not run, by its command line and its files."""
    return Listening.of_values(*(cluster.ask_setting(argv, name, user) for name in SETTINGS))


def of_new(binaries: cluster.Binaries, settings: dict[str, str], user: proc.User) -> Listening:
    """Of a cluster that is not made yet, with these lines in its postgresql.conf."""
    program = str(binaries.path("postgres"))
    described = proc.run([program, "--describe-config"], user=user, env=cluster.environment()).stdout
    fields = [line.split("\t") for line in described.splitlines()]
    # Of the port it tells 0: what initdb writes is what the programs were built with, 5432 where nobody changed it.
    values = {line[0]: line[4] for line in fields if line[0] in SETTINGS} | {"port": "5432"} | settings
    return Listening.of_values(*(values[name] for name in SETTINGS))


def _words(listed: str) -> tuple[str, ...]:
    return tuple(word for part in listed.split(",") if (word := part.strip().strip('"')))


def _answers(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as door:
        try:
            door.connect(os.fspath(place))
        except OSError:
            return False
    return True


def _owner(place: Path) -> str:
    """The server that has a socket, by the lock file beside it: its process id, and its data directory."""
    with suppress(OSError, ValueError, IndexError):
        lines = place.with_name(f"{place.name}.lock").read_text(errors="replace").splitlines()
        return f"the cluster in {lines[1]} (process {int(lines[0])})"
    return "another server"


def _bound(address: str, port: int) -> bool:
    try:
        found = socket.getaddrinfo(
            None if address == "*" else address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError:
        return False
    for family, kind, _, _, where in found:
        with suppress(OSError), socket.socket(family, kind | socket.SOCK_CLOEXEC) as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                door.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                door.bind(where)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
    return False
