"""Which fault points there are, read from the sources; and what changes a disk without passing one.

A point of the engine is the name in a call of `io_...`, or of `runs_write`, which hands it on; one of Python is
ROOM.FUNCTION.CALL, as `sitecustomize` has it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("store", "intervals")
"""Folders in which everything that is written must be durable."""
FILES = (
    "recovery.expiring", "recovery.sweeping", "recovery.joining", "recovery.merged", "recovery.rewind", "rewinding",
    "recovery.restore", "recovery.places", "growing", "extending", "healing", "remaking", "config", "wrapped", "twice",
    "postgres.timelines", "capture.protect", "capture.copying", "capture.fingerprint", "capture.home", "capture.held",
    "capture.volumes", "capture.journal", "capture.renewing", "capture.same_parts",
)  # fmt: skip
"""Rooms elsewhere that write to the store, or what a command stands on that changes a set."""
CALLS = {
    "os.pwrite": ("pwrite",),
    "os.write": ("write",),
    "os.fsync": ("fsync",),
    "os.fdatasync": ("fdatasync",),
    "os.ftruncate": ("ftruncate",),
    "os.posix_fallocate": ("posix_fallocate",),
    "os.sendfile": ("sendfile",),
    "os.rename": ("rename",),
    "os.replace": ("replace",),
    "os.unlink": ("unlink",),
    "os.mkdir": ("mkdir",),
    ".rename": ("rename",),
    ".unlink": ("unlink",),
    ".mkdir": ("mkdir",),
    "write_all": ("pwrite",),
    "punch_hole": ("punch",),
    "sync_file": ("fsync",),
    "sync_directory": ("fsync",),
    "make_directory": ("mkdir", "fsync"),
    "remove_durably": ("unlink", "fsync"),
    "publish_directory": ("fsync", "rename"),
    "write_atomic": ("pwrite", "fsync", "rename"),
    "write_json": ("pwrite", "fsync", "rename"),
    "write_file": ("pwrite", "fsync", "rename"),
    "pq.write_table": ("write_table",),
    "shutil.copyfile": ("copyfile",),
    ".upsert": ("upsert",),
    ".delete_where": ("delete_where",),
}
"""What changes a disk, and as which calls that arrives where faults are made."""
UNWATCHED = {".write_text", ".write_bytes", ".writelines", ".touch", "shutil.move", "shutil.copy", "os.truncate"}
"""What changes a file past them: a place that uses one has no fault point."""


@cache
def engine_points() -> dict[str, str]:
    """NAME: the call, of each point in the engine."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "engine").glob("*.c")):
        if file.name == "io.c":
            continue
        for call, name in re.findall(r'\b(io_\w+|runs_write)\(\s*"([\w.]+)"', file.read_text("utf-8")):
            assert name not in found, f"two places are called {name}"
            found[name] = "io_pwritev" if call == "runs_write" else call  # which hands the name on to that
    return found


def engine_places_without() -> list[str]:
    """Calls in the engine that change a file and name no point."""
    raw = re.compile(
        r"(?<![.>])\b(p?write|pwritev|fsync|fdatasync|rename(?:at)?|unlink(?:at)?|fallocate|ftruncate|truncate)\("
    )
    unnamed = re.compile(r'\bio_(?:pwritev?|zero|fdatasync|fsync_\w+|reserve|rename|unlink)\(\s*(?!")')
    found = []
    for file in sorted((ROOT / "engine").glob("*.c")):
        if file.name == "io.c":
            continue
        for line in file.read_text("utf-8").splitlines():
            code = line.split("/*")[0]
            if raw.search(code) or unnamed.search(code):
                found.append(f"{file.name}: {code.strip()}")
    return found


def _rooms() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for file in sorted((ROOT / "pgcdp" / room).glob("*.py")):
            yield f"{room}.{file.stem}", ast.parse(file.read_text("utf-8"))
    for name in FILES:
        yield name, ast.parse((ROOT / "pgcdp" / f"{name.replace('.', '/')}.py").read_text("utf-8"))


def _called(node: ast.Call) -> Iterator[str]:
    """Names under which CALLS or UNWATCHED may know a call."""
    if isinstance(node.func, ast.Name):
        yield node.func.id
    elif isinstance(node.func, ast.Attribute):
        yield ast.unparse(node.func)
        yield "." + node.func.attr
        yield node.func.attr if isinstance(node.func.value, ast.Name) and node.func.value.id == "fsio" else ""


def _walk(node: ast.AST, within: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner = within
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = (*within, child.name)
        if isinstance(child, ast.Call):
            yield within, child
        yield from _walk(child, inner)


@cache
def python_points() -> frozenset[str]:
    """Each point of the durable rooms."""
    found = set()
    for room, tree in _rooms():
        for within, node in _walk(tree, ()):
            known = next((CALLS[name] for name in _called(node) if name in CALLS), ())
            place = ".".join((room, *within))
            found |= {f"{place}.{call}" for call in known}
    return frozenset(found)


def python_places_without() -> list[str]:
    """Places of the durable rooms that change a file past every point."""
    found = []
    for room, tree in _rooms():
        for within, node in _walk(tree, ()):
            opened = (isinstance(node.func, ast.Attribute) and node.func.attr == "open") or ast.unparse(
                node.func
            ) == "open"
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            writes = opened and any(set(mode) & set("wax+") for mode in modes if len(mode) <= 3)
            if writes or any(name in UNWATCHED for name in _called(node)):
                found.append(".".join((room, *within)))
    return found
