"""Whether the journal is the one that the set was captured with last: not an older copy of it, not one from before.

Capture begins with a replay of its journal onto the volumes. An older one would write what they had then over what they
have by now: a copy from a backup, or a disk that was not mounted for a while and is again. So each journal has an
identity, which is a new one when it begins anew, and the set's state directory knows it, and how far its applied mark
had come. Both are noted at each start and at each stop in order.

What is not found by this: a copy that was made since capture was started last, brought back after a crash.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import NamedTuple

from pgcdp import fsio
from pgcdp.capture.journal import Journal
from pgcdp.config import Config
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.sets import SetPaths

FILE = "journal.json"
"""In the journal, {"id"}; in the state directory, {"id", "mark"}: the least sequence that its applied mark has."""


def refuse_other(config: Config) -> None:
    """Raises PreconditionError when another journal lies at its place. Nothing is attached yet."""
    known = _read(config.paths.state / FILE)
    if known is None:
        return
    try:
        marks = Journal(config.journal, config.set_id_bytes).applied_marks()
    except (DamageError, OSError):
        marks = None
    if marks is None:  # the engine tells of it
        return
    there = _read(config.journal / FILE)
    same = there is not None and there.identity == known.identity
    least = known.mark - (len(marks) == 1)  # the newest slot may be torn, or damaged: the one before it counts then
    if same and max(mark.sequence for mark in marks) >= least:
        return
    why = "it is an older copy" if same else "it is another one"
    raise PreconditionError(
        f"the journal {config.journal} is not what {config.name} was captured with last: {why}, whose writes would "
        "overwrite newer ones on the volumes",
        "bring back the newest one, or mount its disk; without it, what the store has can be restored: pgcdp restore "
        f"--store {config.store} --to-directory DIR. Who knows that it is the newest all the same, removes "
        f"{config.paths.state / FILE}",
    )


def note(config: Config) -> None:
    """The journal is the one that is there, durably; capture runs on it, or has just stopped."""
    mark = Journal(config.journal, config.set_id_bytes).applied_mark()
    if mark is None:
        return
    fsio.sync_file(config.journal / "applied")  # what a power cut takes back must not be what is asked for
    there = _read(config.journal / FILE)
    identity = renew(config) if there is None else there.identity
    config.paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    fsio.write_json(config.paths.state / FILE, {"id": identity, "mark": mark.sequence})


def forget(paths: SetPaths) -> None:
    """Whichever journal is there at the next start is taken, durably. Harmless when done twice."""
    if (paths.state / FILE).exists():
        fsio.remove_durably(paths.state / FILE)


def renew(config: Config) -> str:
    """The journal is another one from now on, durably; its identity."""
    identity = secrets.token_hex(16)
    fsio.write_json(config.journal / FILE, {"id": identity})
    return identity


class _Known(NamedTuple):
    identity: str
    mark: int


def _read(file: Path) -> _Known | None:
    try:
        content = fsio.read_json(file)
        return _Known(str(content["id"]), int(content.get("mark", 0)))
    except (FileNotFoundError, DamageError, KeyError, TypeError, ValueError):
        return None
