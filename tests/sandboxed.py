"""What a sandbox says, and what lies in a directory, for tests of sandboxes."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from pgcdp.recovery.sandbox import Sandbox


def fingerprint(directory: Path) -> dict[str, str]:
    """Every file below a directory with its content's hash, without those that any session of Postgres makes anew."""
    found = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file() and not file.is_symlink() and not file.name.startswith("pg_internal.init"):
            with suppress(FileNotFoundError):  # gone meanwhile
                found[str(file.relative_to(directory))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def shown(box: Sandbox, name: str) -> str:
    with box.connect() as connection:
        row = connection.execute("select current_setting(%s)", [name]).fetchone()
    assert row is not None
    return str(row[0])


def value(box: Sandbox, statement: str, database: str = "postgres") -> Any:
    with box.connect(database) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return None if row is None else row[0]
