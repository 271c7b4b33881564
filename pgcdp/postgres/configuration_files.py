"""Configuration files outside of the data directory, as Debian has them: read for the store, and fit for a copy.

Each becomes one text, with what it includes in the place of the include (PostgreSQL's documentation, 20.1.5 and 21.1).
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pgcdp.postgres.session import as_user
from pgcdp.proc import User

NAMES = {"config_file": "postgresql.conf", "hba_file": "pg_hba.conf", "ident_file": "pg_ident.conf"}
"""Settings that say where they are, and what they are called in a data directory."""
MOST_BYTES = 1 << 20
"""Of one of them, with all that it includes."""
_DEPTH = 10
_INCLUDE = re.compile(
    rb"\s*(include|include_if_exists|include_dir)(?:\s*=\s*|\s+)(?:'((?:[^'\\]|''|\\.)+)'|\"([^\"]+)\"|([^\s'\"#]+))",
    re.IGNORECASE,
)
# Paths of production, and where its data directory is: in a copy they would lead to production itself.
_OF_PLACES = re.compile(
    rb"\s*(data_directory|config_file|hba_file|ident_file|external_pid_file|stats_temp_directory)\b", re.IGNORECASE
)
_MARK = b"#pgcdp: "


def read_outside(settings: Mapping[str, Any], pgdata: Path, owner: User | None) -> dict[str, dict[str, str]]:
    """{file name in a data directory: {"path", "zlib"}} of those that lie outside of `pgdata`; see `text_of`.

    `settings` as `session.settings` gives them. Read with the rights of `owner`, whom the paths come from. What cannot
    be read, or is larger than `MOST_BYTES`, is left out.
    """
    places = {row["name"]: Path(str(row["setting"])) for row in settings["settings"] if row["name"] in NAMES}
    found = {}
    for setting, path in places.items():
        if not path.is_absolute() or path.is_relative_to(pgdata):
            continue
        try:
            with as_user(owner):
                if owner is not None and os.geteuid() != owner.uid:  # root's own files are none of the owner's business
                    continue
                text = b"".join(line + b"\n" for line in _lines(path, _Budget(MOST_BYTES)))
        except (OSError, ValueError):  # a name with a NUL byte
            continue
        found[NAMES[setting]] = {"path": str(path), "zlib": b64encode(zlib.compress(text, 9)).decode()}
    return found


def text_of(kept: Mapping[str, str]) -> bytes:
    """The text of one that `read_outside` found."""
    return zlib.decompress(b64decode(kept["zlib"]))


def for_a_copy(text: bytes) -> bytes:
    """postgresql.conf without what would lead a Postgres on a copy to production's own files."""
    lines = text.splitlines(keepends=True)
    return b"".join(_MARK + line if _OF_PLACES.match(line) else line for line in lines)


class _Budget:
    """Bytes that may still be read."""

    def __init__(self, left: int) -> None:
        self._left = left

    def read(self, path: Path) -> bytes:
        """A regular file. Raises OSError, also when it is too large."""
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(f"{path} is no file")
            content = b""
            while piece := os.read(file, self._left + 1 - len(content)):
                content += piece
        finally:
            os.close(file)
        if len(content) > self._left:
            raise OSError(f"{path} is too large")
        self._left -= len(content)
        return content


def _lines(path: Path, budget: _Budget, depth: int = 0) -> Iterator[bytes]:
    for line in budget.read(path).splitlines():
        match = _INCLUDE.match(line)
        if match is None or depth == _DEPTH:
            yield line
            continue
        how, name = match[1].lower(), match[3] or match[4] or match[2].replace(b"''", b"'")
        place = path.parent / os.fsdecode(name)
        try:
            included = [inner for each in _named(how, place) for inner in _included(each, budget, depth)]
        except FileNotFoundError:
            yield (_MARK if how == b"include_if_exists" else b"") + line
        else:
            yield _MARK + line
            yield from included


def _named(how: bytes, place: Path) -> list[Path]:
    if how != b"include_dir":
        return [place]
    found = (path for path in place.iterdir() if path.suffix == ".conf" and not path.name.startswith("."))
    return sorted(path for path in found if not path.is_dir())


def _included(path: Path, budget: _Budget, depth: int) -> list[bytes]:
    return [_MARK + b"from " + os.fsencode(path), *_lines(path, budget, depth + 1)]
