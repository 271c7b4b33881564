"""One log for a process: lines `time LEVEL room: message` to a 0600 file or to standard error.

Errors are logged where they are consumed, never where they are passed on.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path


class _Lines(logging.Formatter):
    """RFC 3339 UTC times with microseconds, as in everything else that pgcdp prints."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        micros = int(record.created % 1 * 1_000_000)
        room = record.name.removeprefix("pgcdp.")
        line = f"{seconds}.{micros:06d}Z {record.levelname} {room}: {record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def get(room: str) -> logging.Logger:
    """The logger of a room; call it with `__name__`."""
    return logging.getLogger(room)


def start(file: Path | None = None, level: str = "info") -> None:
    """Send this process's log to `file` (appended, 0600), or to standard error; a second call replaces the first."""
    if file is None:
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
    else:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")  # paths may be any bytes
    handler.setFormatter(_Lines())
    logger = logging.getLogger("pgcdp")
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
