"""Where the agent serves metrics: what the setting `metrics_listen` may say."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

SOCKET_PATH_LIMIT = 107


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP port at a host, or the Unix socket at `path`."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return os.fspath(self.path)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address | None:
    """None for "off". Raises ValueError for what is no address.

    A host is an IP address or localhost: the agent asks no name server.
    """
    if text == "off":
        return None
    if text.startswith("/"):
        if len(os.fsencode(text)) > SOCKET_PATH_LIMIT or text.endswith("/"):
            raise ValueError(text)
        return Address(path=Path(text))
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]/\s]+)):([0-9]{1,5})", text)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ValueError(text)
    host = match[1] or match[2]
    if host == "localhost":
        host = "127.0.0.1"
    ipaddress.IPv6Address(host) if match[1] else ipaddress.IPv4Address(host)
    return Address(host, int(match[3]))
