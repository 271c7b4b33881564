"""An interval without its single writes: both its boundaries can still be restored (FORMAT.md 3.10).

Its forward increment points into the raw writes. So what that names is copied to `forward` first; then the manifest is
replaced, atomically and once, by one that names this file instead; and from then on `writes` is nothing (`leftovers`).
Whoever opened the interval before, reads on in files that are there until it is known that nobody does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import numpy as np

from pgcdp.errors import BugError, PgcdpError
from pgcdp.fsio import read_json, sync_directory, write_json
from pgcdp.records import BLOCK, EXTENT_DATA, Span
from pgcdp.store.bundle import CATALOG_NOTES, CONTENTS, WAL_STATE, Bundle
from pgcdp.store.frames import DEFAULT_LEVEL, FrameWriter
from pgcdp.store.layout import Store

PIECE_BYTES = 1 << 20

GONE = ("writes", CATALOG_NOTES, WAL_STATE)
"""What goes: the raw writes, and what only the interval behind it is indexed with."""


Commit = Callable[[], AbstractContextManager[object]]
"""Inside it, what was made is published: with readers kept out of the image (`recovery.sweeping.Quiet`)."""

Stop = Callable[[], bool]
"""Whether to stop, asked between pieces of long work; then Stopped is raised."""


class Stopped(Exception):
    """A run was told to stop while it waited, or in the middle of a step: nothing of that counts."""


def never() -> bool:
    """A `Stop` that goes on."""
    return False


def thin(
    store: Store, span: Span, level: int = DEFAULT_LEVEL, commit: Commit = nullcontext, stop: Stop = never
) -> Bundle:
    """Let go of an interval's single writes, durably; harmless when it was done. Its old files stay (`leftovers`).

    One process at a time. Raises DamageError when what it reads is damaged, and has changed nothing then; nor has it
    when it raises anything else, unless the manifest says that the writes are gone.
    """
    bundle = Bundle.at(store, span)
    if not bundle.interval.restorable_by_write:
        return bundle
    try:
        return _thin(store, bundle, level, commit, stop)
    except BaseException:
        with suppress(OSError, PgcdpError):  # the manifest may be replaced, and what failed came behind it
            if read_json(bundle.path / "manifest.json")["restorable_by_write"]:
                (bundle.path / "forward").unlink(missing_ok=True)
        raise


def _thin(store: Store, bundle: Bundle, level: int, commit: Commit, stop: Stop) -> Bundle:
    forward = copy_forward(bundle, bundle.path / "forward", store.set_id, level, stop)
    sync_directory(bundle.path)
    manifest = dict(bundle.manifest)
    files = {name: entry for name, entry in manifest["files"].items() if name not in GONE}
    files["forward"] = forward
    stored = {**manifest["stored"], "writes": 0, "forward": forward["bytes"] + files["forward.map"]["bytes"]}
    gone = sum(manifest["files"].get(name, {}).get("bytes", 0) for name in (CATALOG_NOTES, WAL_STATE))
    manifest |= {
        "restorable_by_write": False,
        "stored": {**stored, "transactions": max(0, stored["transactions"] - gone)},
        "files": files,
        "increments": {**manifest["increments"], "forward": forward["checksum"]},
    }
    with commit():
        write_json(bundle.path / "manifest.json", manifest)
    return Bundle.at(store, bundle.interval.span)


def copy_forward(bundle: Bundle, path: Path, set_id: bytes, level: int, stop: Stop = never) -> dict[str, object]:
    """Copy what an interval's forward map names to a file, one behind the other in order of its source; synced.

    Returns the file's entry in a manifest. Raises Stopped.
    """
    extents = bundle.forward_map()
    data = extents[extents["kind"] == EXTENT_DATA]
    data = data[np.argsort(data["source"], kind="stable")]
    writer = FrameWriter.create(path, CONTENTS["forward"], set_id, bundle.number, level=level)
    try:
        with bundle.forward() as content:
            for source, count in zip(data["source"].tolist(), data["count"].tolist(), strict=True):
                for begin in range(0, count * BLOCK, PIECE_BYTES):
                    if stop():
                        raise Stopped
                    writer.append(content.read(source + begin, min(PIECE_BYTES, count * BLOCK - begin)))
        made = writer.finish()
    finally:
        writer.close()
    if made.length != int(data["count"].sum()) * BLOCK:
        raise BugError(f"{path} has {made.length} bytes, its map another number")
    return made.entry()


def leftovers(bundle: Bundle) -> list[Path]:
    """Files of a thinned interval that its manifest does not name any more; of another, what a failed try left."""
    if bundle.interval.restorable_by_write:
        forward = bundle.path / "forward"
        return [forward] if forward.exists() and not bundle.has("forward") else []
    names = set(bundle.manifest["files"]) | {"manifest.json"}
    return sorted(path for path in bundle.path.iterdir() if path.name not in names)
