"""The layer table: a file imports only from its own or lower floors, there are no cycles, and some doors have one key.

This file is the table. Whoever finds a better plan changes it here, in the commit that changes the code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PYTHON_FLOORS: dict[str, int] = {
    "pgcdp": 0,
    "pgcdp.errors": 0,
    "pgcdp.records": 0,
    "pgcdp.units": 0,
    "pgcdp.progress": 0,
    "pgcdp.config": 1,
    "pgcdp.sets": 1,
    "pgcdp.settings_table": 1,
    "pgcdp.setting_values": 1,
    "pgcdp.log": 1,
    "pgcdp.fsio": 1,
    "pgcdp.machine": 1,
    "pgcdp.sealing": 1,
    "pgcdp.keys": 1,
    "pgcdp.twice": 1,
    "pgcdp.wrapped": 1,
    "pgcdp.proc": 1,
    "pgcdp.background": 1,
    "pgcdp.horizon": 1,
    "pgcdp.metrics_address": 0,
    "pgcdp.postgres.*": 2,
    "pgcdp.capture.*": 3,
    "pgcdp.store.*": 4,
    "pgcdp.intervals.*": 5,
    "pgcdp.recovery.*": 6,
    "pgcdp.service": 7,
    "pgcdp.doctor": 7,
    "pgcdp.forecast": 7,
    "pgcdp.following": 7,
    "pgcdp.logged": 7,
    "pgcdp.opening": 7,
    "pgcdp.cloning": 7,
    "pgcdp.verifying": 7,
    "pgcdp.protecting": 7,
    "pgcdp.restoring": 7,
    "pgcdp.showing": 7,
    "pgcdp.looking": 7,
    "pgcdp.around": 7,
    "pgcdp.transactions": 7,
    "pgcdp.salvaging": 7,
    "pgcdp.rewinding": 7,
    "pgcdp.remaking": 7,
    "pgcdp.room_at_point": 7,
    "pgcdp.owning": 7,
    "pgcdp.extending": 7,
    "pgcdp.growing": 7,
    "pgcdp.healing": 7,
    "pgcdp.keeping": 7,
    "pgcdp.expiring": 7,
    "pgcdp.marking": 7,
    "pgcdp.scrubbing": 7,
    "pgcdp.serving.*": 7,
    "pgcdp.checking.*": 7,
    "pgcdp.agent": 7,
    "pgcdp.api": 7,
    "pgcdp.demo": 7,
    "pgcdp.throwaway": 7,
    "pgcdp.cli.*": 8,
    "pgcdp.pytest_plugin": 8,
    "pgcdp.__main__": 8,
}
"""Floor of each room; "x.*" is a folder, itself included."""

ONE_KEY: dict[str, tuple[str, ...]] = {
    "sqlite3": ("pgcdp.store.catalog",),
    "sqlite_utils": ("pgcdp.store.catalog",),
    "psycopg": ("pgcdp.postgres",),
    "asyncpg": ("pgcdp.postgres",),
    "pglast": ("pgcdp.postgres",),
    "pyarrow": ("pgcdp.store", "pgcdp.intervals", "pgcdp.recovery"),
    "click": ("pgcdp.cli",),
    "rich": ("pgcdp.cli",),
    "prometheus_client": ("pgcdp.serving",),
}
"""Libraries that only these rooms may import."""

C_FLOORS: dict[str, int] = {
    "util": 0,
    "cleanup": 0,
    "err": 0,
    "log": 0,
    "cursor": 0,
    "io": 1,
    "checksum": 1,
    "command": 1,
    "seal": 1,
    "extmap": 1,
    "pool": 1,
    "faults": 1,
    "format": 2,
    "backend": 2,
    "backing": 2,
    "journal_write": 3,
    "journal_writer": 3,
    "journal_segments": 3,
    "journal_read": 3,
    "journal_files": 3,
    "frames": 3,
    "frame_file": 3,
    "frame_cache": 3,
    "block_map": 3,
    "shown_map": 3,
    "image": 3,
    "overlay": 3,
    "wal": 4,
    "wal_pages": 4,
    "wal_stash": 4,
    "wal_record": 4,
    "wal_xacts": 4,
    "wal_notes": 4,
    "volume": 4,
    "volume_set": 4,
    "apply": 4,
    "runs": 3,
    "replay": 4,
    "rewrite": 4,
    "tracked": 3,
    "tracking": 4,
    "hot_copy": 4,
    "reads": 4,
    "view": 4,
    "held": 4,
    "front_fuse": 5,
    "control": 5,
    "capture": 6,
    "capture_process": 6,
    "capture_arguments": 6,
    "capture_control": 6,
    "holder": 6,
    "dump": 6,
    "show_view": 6,
    "list_map": 6,
    "logged": 4,
    "ext4_log": 4,
    "xfs_trans": 4,
    "xfs_log": 4,
    "wal_files": 5,
    "wal_state": 5,
    "wal_tables": 5,
    "wal_settle": 5,
    "wal_index": 6,
    "main": 6,
}
"""Floor of each room of the engine: NAME.c and NAME.h."""

C_BACK_ROOMS: dict[str, str] = {
    "volume_set": "volume",
    "apply": "volume",
    "reads": "volume",
    "rewrite": "volume",
    "tracking": "volume",
    "hot_copy": "volume",
    "journal_files": "journal_read",
    "journal_writer": "journal_write",
    "journal_segments": "journal_write",
    "wal_pages": "wal",
    "wal_stash": "wal",
}
"""Files that belong to a room without being its door: the room's own files share what only they may see."""


# --- Python


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _modules() -> dict[str, ast.Module]:
    return {_module(file): ast.parse(file.read_text("utf-8")) for file in sorted((ROOT / "pgcdp").rglob("*.py"))}


def _floor(module: str) -> int | None:
    if module in PYTHON_FLOORS:
        return PYTHON_FLOORS[module]
    parts = module.split(".")
    return next((f for n in range(len(parts), 0, -1) if (f := PYTHON_FLOORS.get(".".join(parts[:n]) + ".*"))), None)


def _imported(tree: ast.Module) -> set[str]:
    """Full names of what is imported anywhere in the file, in functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _own_imports(module: str) -> set[str]:
    """Modules of pgcdp that `module` imports. Its own package does not count: that import is implied."""
    modules = _modules()
    found = set()
    for name in _imported(_modules()[module]):
        known = next((m for m in (name, name.rpartition(".")[0]) if m in modules), None)
        if known is not None and known != module:
            found.add(known)
    return found


def test_each_python_file_has_a_room() -> None:
    assert [module for module in _modules() if _floor(module) is None] == []


def test_python_never_imports_upward() -> None:
    wrong = [
        f"{module} (floor {_floor(module)}) imports {other} (floor {_floor(other)})"
        for module in _modules()
        for other in _own_imports(module)
        if (_floor(other) or 0) > (_floor(module) or 0)
    ]
    assert wrong == []


def test_python_has_no_import_cycle() -> None:
    _no_cycle({module: _own_imports(module) for module in _modules()})


def test_libraries_are_imported_only_where_they_belong() -> None:
    wrong = [
        f"{module} imports {library}"
        for module, tree in _modules().items()
        for library in {name.partition(".")[0] for name in _imported(tree)}
        if library in ONE_KEY and not any(f"{module}.".startswith(f"{room}.") for room in ONE_KEY[library])
    ]
    assert wrong == []


def test_only_the_command_line_prints() -> None:
    wrong = []
    for module, tree in _modules().items():
        for node in ast.walk(tree):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            is_stdout = isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.__stdout__")
            if (is_print or is_stdout) and not module.startswith("pgcdp.cli"):
                wrong.append(f"{module}, line {node.lineno}")  # type: ignore[attr-defined]
    assert wrong == []


def test_only_capture_engine_knows_the_engine_program() -> None:
    wrong = []
    for module, tree in _modules().items():
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.endswith("pgcdp-engine")
                and id(node) not in documentation
                and module != "pgcdp.capture.engine"
            ):
                wrong.append(f"{module}, line {node.lineno}")
    assert wrong == []


# --- C


@cache
def _c_files() -> dict[str, list[str]]:
    """Files of the engine and the project headers that each includes."""
    files = [file for file in sorted((ROOT / "engine").iterdir()) if file.suffix in (".c", ".h")]
    return {file.name: re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text("utf-8"), re.M) for file in files}


def _room(name: str) -> str:
    return name.rpartition(".")[0]


def _house(name: str) -> str:
    return C_BACK_ROOMS.get(_room(name), _room(name))


def test_each_c_file_has_a_room() -> None:
    assert [name for name in _c_files() if _room(name) not in C_FLOORS] == []


def test_c_never_includes_upward() -> None:
    wrong = [
        f"{name} (floor {C_FLOORS[_room(name)]}) includes {header} (floor {C_FLOORS[_room(header)]})"
        for name, headers in _c_files().items()
        for header in headers
        if C_FLOORS[_room(header)] > C_FLOORS[_room(name)]
    ]
    assert wrong == []


def test_c_rooms_have_no_cycle() -> None:
    rooms: dict[str, set[str]] = {}
    for name, headers in _c_files().items():
        rooms.setdefault(_house(name), set()).update({_house(header) for header in headers} - {_house(name)})
    _no_cycle(rooms)


def test_back_rooms_of_the_engine_are_private() -> None:
    wrong = [
        f"{name} includes {header}"
        for name, headers in _c_files().items()
        for header in headers
        if _room(header) in C_BACK_ROOMS and _house(header) != _house(name)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("header", "rooms"),
    [("fuse_lowlevel.h", {"front_fuse"}), ("fuse.h", {"front_fuse"}), ("sys/un.h", {"control", "held"})],
)
def test_doors_of_the_engine_have_one_file_each(header: str, rooms: set[str]) -> None:
    users = [
        name
        for name in _c_files()
        if re.search(rf"#\s*include\s+<(fuse3/)?{re.escape(header)}>", (ROOT / "engine" / name).read_text("utf-8"))
    ]
    assert {_room(user) for user in users} <= rooms


def test_meson_builds_each_c_file() -> None:
    listed = set(re.findall(r"'engine/(\w+\.c)'", (ROOT / "meson.build").read_text("utf-8")))
    assert listed == {name for name in _c_files() if name.endswith(".c")}


# --- both


def _no_cycle(graph: Mapping[str, Iterable[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports in a circle: " + " -> ".join(error.args[1]))


def test_folders_of_python_packages_are_known_to_meson() -> None:
    """What Python leaves in __pycache__ of the checkout must not be installed."""
    listed = re.search(r"foreach room : \[([^]]*)\]", (ROOT / "meson.build").read_text("utf-8"))
    assert listed is not None
    folders = {file.parent.name for file in (ROOT / "pgcdp").rglob("*.py")} - {"pgcdp"}
    assert set(re.findall(r"\w+", listed[1])) == folders
