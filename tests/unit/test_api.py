"""`api` loads a room when it is asked for one of its use cases: a command must not wait for what it never calls."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from pgcdp import api

SOURCE = Path(api.__file__)


def typed() -> dict[str, tuple[str, ...]]:
    """What type checkers are told: the use cases by room."""
    (block,) = (node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    found: dict[str, list[str]] = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        assert line.module is not None
        for alias in line.names:
            if alias.asname is not None:
                found.setdefault(line.module.removeprefix("pgcdp."), []).append(alias.name)
    return {room: tuple(names) for room, names in found.items()}


def test_what_type_checkers_are_told_is_what_there_is() -> None:
    assert typed() == api.ROOMS
    for names in api.ROOMS.values():
        assert all(callable(getattr(api, name)) for name in names)


def test_a_name_that_is_none_is_named() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'protekt'"):
        api.protekt  # noqa: B018


@pytest.mark.parametrize("name", ["status", "cut", "up", "down", "mark", "info"])
def test_a_small_command_loads_no_arrow_and_no_parser_of_sql(name: str) -> None:
    """They are half a second of each command."""
    words = f"import sys; from pgcdp import api; api.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", words], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "pgcdp.api" in loaded
    assert not {"pyarrow", "pglast"} & set(loaded)
