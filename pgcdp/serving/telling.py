"""The agent's part of `pgcdp status`: what it is at, and what keeps it from its work."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from pgcdp.capture.outside import Outside
from pgcdp.intervals.stages import Stages
from pgcdp.serving.background import Background
from pgcdp.serving.questions import Questions
from pgcdp.serving.surroundings import Surroundings


def describe(
    stages: Stages | None,
    error: str | None,
    waiting: str,
    questions: Questions,
    surroundings: Surroundings,
    background: Background,
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
        "boundary": newest.number,
        "stored_write": newest.write,
        "stored_time_ns": newest.time_ns,
        "taken_write": opened.last_write,
        "look_seconds": round(time.monotonic() - questions.whole_look_at),
        "no_look": questions.no_look,
        "waiting": waiting,
        "outside": outside_json(surroundings.outside),
        "not_expired": background.not_expired,
        "scrubbing": background.scrubber.running,
    }


def outside_json(found: Sequence[Outside] | None) -> list[dict[str, str]] | None:
    """What lies outside of a set."""
    return None if found is None else [{"name": each.name, "place": os.fspath(each.place)} for each in found]
