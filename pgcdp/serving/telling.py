"""The agent's part of `pgcdp status`: what it is at, and what keeps it from its work."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

from pgcdp.capture.journal import LostWritesError
from pgcdp.capture.outside import rows_of
from pgcdp.config import Config
from pgcdp.errors import PgcdpError
from pgcdp.fsio import NO_ROOM, told
from pgcdp.intervals.stages import Stages
from pgcdp.opening import outside_json
from pgcdp.records import Boundary
from pgcdp.serving.background import Background
from pgcdp.serving.prover import Prover
from pgcdp.serving.questions import Questions
from pgcdp.serving.surroundings import Surroundings

MAKE_ROOM = "make room there: it goes on by itself"


def describe(
    stages: Stages | None,
    error: str | None,
    waiting: str,
    questions: Questions,
    surroundings: Surroundings,
    background: Background,
    prover: Prover,
) -> dict[str, Any]:
    """The answer to {"cmd":"status"}. `waiting`: for which views the image waits."""
    reply: dict[str, Any] = {"pid": os.getpid(), "error": error, "phase": "starting"}
    if stages is None:
        return reply
    # The worker goes from one to the next meanwhile: each is looked at once.
    baseline, newest, opened = stages.baseline, stages.newest, stages.opened
    if baseline is not None:
        phase = "baseline" if stages.baseline_end is None else "checkpoint"
        return {**reply, "phase": phase, "baseline": {"done": baseline.done, "total": baseline.total}}
    if newest is None or opened is None:
        return reply
    return {
        **reply,
        "phase": "following",
        "taken_write": opened.last_write,
        "behind": bool(stages.behind),
        "look_seconds": round(time.monotonic() - questions.whole_look_at),
        "no_look": questions.no_look,
        "waiting": waiting,
        "outside": outside_json(rows_of(surroundings.outside)),
        "not_expired": background.not_expired,
        "scrubbing": background.scrubber.running,
        "proving": {"boundary": prover.proven, "problem": prover.problem},
    }


def stored_json(newest: Boundary | None) -> dict[str, Any]:
    """What the store holds, also while it cannot be read: its newest boundary."""
    if newest is None:
        return {}
    return {"boundary": newest.number, "stored_write": newest.write, "stored_time_ns": newest.time_ns}


def of_the_journal(config: Config, error: PgcdpError | OSError) -> bool:
    """Whether it was met in reading the journal, with nothing wrong with the store.

    After any other one nothing may be synced once more: a disk tells of a write that it has lost only once.
    """
    if isinstance(error, OSError):
        return str(error.filename).startswith(f"{config.journal}/")
    return isinstance(error, LostWritesError)


def problem(config: Config, error: PgcdpError | OSError) -> tuple[str, str | None]:
    """What keeps the agent from its work, and what mends it."""
    without = (
        f"bring the file back, or go on without it: pgcdp down {config.name}, then pgcdp up {config.name} --heal, "
        "which takes in what the volumes have, as a gap"
    )
    if isinstance(error, LostWritesError):
        return error.message, f"{error.hint}; {without}"
    if isinstance(error, OSError) and error.errno == errno.EIO and of_the_journal(config, error):
        return told(error), f"see whether its disk works: when it is well again, it goes on by itself; else {without}"
    if isinstance(error, PgcdpError):
        return error.message, error.hint
    if error.errno in NO_ROOM:
        return told(error), MAKE_ROOM
    return told(error), "see whether its disk works and is mounted: when it is well again, it goes on by itself"
