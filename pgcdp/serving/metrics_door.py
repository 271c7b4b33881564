"""Serves metrics over HTTP, at a TCP port or a Unix socket. Whoever gets there may read: there are no passwords."""

from __future__ import annotations

import os
import socket
import socketserver
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from pgcdp import log
from pgcdp.errors import PreconditionError
from pgcdp.metrics_address import Address, parse_address

logger = log.get(__name__)

RETRY_SECONDS = 60.0
REQUEST_SECONDS = 10.0
"""Who says nothing for so long is not waited for."""


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *arguments: Any) -> None:
        """A scrape is no news."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without asking a name server who this machine is."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked has gone, most often; the agent has more to do than this."""
        logger.debug("a request for metrics failed", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """A peer has no address there, but WSGI wants one."""
        connection, _ = self.socket.accept()
        return connection, ("local", 0)


class MetricsDoor:
    """Open from `open` to `close`."""

    def __init__(self, address: Address, registry: CollectorRegistry) -> None:
        self._address = address
        self._app = make_wsgi_app(registry)
        self._server: _Server | None = None

    @property
    def is_open(self) -> bool:
        return self._server is not None

    def open(self) -> None:
        """Raises PreconditionError when somebody else has the address, or it is none of this machine's."""
        address = self._address
        try:
            if address.path is not None:
                _clear(address.path)
                server: _Server = _UnixServer(os.fspath(address.path), _Handler)  # type: ignore[arg-type]
                try:
                    address.path.chmod(0o600)
                except OSError:  # somebody has removed it
                    server.server_close()
                    raise
            else:
                kind = _Server6 if ":" in address.host else _Server
                server = kind((address.host, address.port), _Handler)
        except OSError as error:
            raise PreconditionError(
                f"metrics cannot be served at {address}: {error.strerror or error}",
                "end what has that address, or set metrics_listen to another; the agent tries again each minute",
            ) from None
        server.set_app(self._app)
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        self._server = server
        logger.info("metrics at %s", address)

    def close(self) -> None:
        """Harmless when it is not open."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        if self._address.path is not None:
            self._address.path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Take away what an agent that was killed left. Raises OSError when somebody answers there, or it is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(17, "a file is there that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(1.0)
        with suppress(ConnectionRefusedError):
            door.connect(os.fspath(path))
            raise OSError(98, "Address already in use")
    path.unlink()


class MetricsService:
    """The door, opened again and again while something keeps it shut: capture goes on without it."""

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        self.error: str | None = None
        self._listen = listen
        address = parse_address(listen)
        self._door = None if address is None else MetricsDoor(address, registry)
        self._tried_at = -RETRY_SECONDS

    def keep_open(self) -> None:
        """Called at each turn."""
        door = self._door
        if door is None or door.is_open or time.monotonic() - self._tried_at < RETRY_SECONDS:
            return
        self._tried_at = time.monotonic()
        try:
            door.open()
        except PreconditionError as error:
            if error.message != self.error:
                logger.warning("%s", error.message)
            self.error = error.message
        else:
            self.error = None

    def told(self) -> dict[str, str | None]:
        """For the status: {"listen", "error"}."""
        return {"listen": self._listen, "error": self.error}

    def close(self) -> None:
        """Serve no longer."""
        if self._door is not None:
            self._door.close()
