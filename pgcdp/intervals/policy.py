"""Pure: when an interval is cut (requirement R6). The agent asks often, with what has happened since the last boundary.

Rules, several may hold and the first that is due counts:

- `checkpoint`: cut at every checkpoint that Postgres itself completes
- a period (`5min`): ask for a checkpoint that long after the last boundary, if there were writes
- a quantity (`1G`): ask for a checkpoint when that many bytes were written
- `rate` or `rate:BYTES`: the period shrinks as the recent rate of writes grows. At BYTES a second (1 MiB if not said)
  it is 5 minutes, at ten times that a tenth, at a tenth ten times as long; never under 15 seconds nor over 1 hour

Without writes nothing is ever cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pgcdp.errors import UsageError
from pgcdp.units import parse_duration, parse_size

DEFAULT_CUT = ("checkpoint", "5min", "1G")
RATE_REFERENCE = 1024 * 1024
RATE_PERIOD = 300.0
RATE_SHORTEST = 15.0
RATE_LONGEST = 3600.0
RATE_HALF_LIFE = 30.0

Reason = Literal["checkpoint", "period", "quantity", "rate"]


@dataclass(frozen=True, slots=True)
class Policy:
    """Which rules hold; None or False: this one does not."""

    own_checkpoints: bool = False
    period_seconds: float | None = None
    quantity_bytes: int | None = None
    rate_bytes_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """The open interval: seconds since the last boundary, writes and bytes since, and the recent rate (`smooth_rate`).

    `checkpoint_seen`: a checkpoint of Postgres's own is complete in it. `checkpoint_asked`: one that was asked for is
    under way.
    """

    seconds: float
    writes: int
    bytes_written: int
    rate: float = 0.0
    checkpoint_seen: bool = False
    checkpoint_asked: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """ "wait"; "cut" at the checkpoint that was seen; "ask" Postgres for a checkpoint and cut there."""

    action: Literal["wait", "cut", "ask"]
    reason: Reason | None = None


def parse_policy(words: Sequence[str]) -> Policy:
    """The policy of `--cut` words or the set's `cut` setting: "checkpoint", "5min", "1GiB", "rate", "rate:4M".

    Raises UsageError for anything else, for a rule said twice and for none at all.
    """
    found: dict[str, float | int | bool] = {}
    for word in words:
        name, value = _rule(word.strip())
        if name in found:
            raise UsageError(f'"{word}" says a second time when to cut by {name.split("_")[0]}', "give each rule once")
        found[name] = value
    if not found:
        raise UsageError("no rule says when to cut", f"the default is {' '.join(DEFAULT_CUT)}")
    return Policy(**found)  # type: ignore[arg-type]


def _rule(word: str) -> tuple[str, float | int | bool]:
    if word == "checkpoint":
        return "own_checkpoints", True
    if word == "rate":
        return "rate_bytes_per_second", float(RATE_REFERENCE)
    value: float | int
    if word.startswith("rate:"):
        name, value = "rate_bytes_per_second", float(parse_size(word.removeprefix("rate:").removesuffix("/s")))
    else:
        try:
            name, value = "period_seconds", parse_duration(word)
        except UsageError:
            try:
                name, value = "quantity_bytes", parse_size(word)
            except UsageError:
                raise UsageError(
                    f'"{word}" does not say when to cut', "write checkpoint, a period as 5min, bytes as 1G, or rate"
                ) from None
    if value <= 0:
        raise UsageError(f'"{word}" is not more than nothing', "write a period as 5min or bytes as 1G")
    return name, value


def rate_period(policy_rate: float, rate: float) -> float:
    """Seconds that an interval lasts under the rate rule at a recent rate of `rate` bytes a second."""
    if rate <= 0:
        return RATE_LONGEST
    return min(RATE_LONGEST, max(RATE_SHORTEST, RATE_PERIOD * policy_rate / rate))


def decide(policy: Policy, progress: Progress) -> Decision:
    """What to do now. While an asked checkpoint is under way there is nothing to do but wait for it."""
    if progress.checkpoint_asked or not progress.writes:
        return Decision("wait")
    if policy.own_checkpoints and progress.checkpoint_seen:
        return Decision("cut", "checkpoint")
    due: Reason | None = None
    if policy.quantity_bytes is not None and progress.bytes_written >= policy.quantity_bytes:
        due = "quantity"
    elif policy.period_seconds is not None and progress.seconds >= policy.period_seconds:
        due = "period"
    elif policy.rate_bytes_per_second is not None:
        period = rate_period(policy.rate_bytes_per_second, progress.rate)
        due = "rate" if progress.seconds >= period else None
    return Decision("wait") if due is None else Decision("ask", due)


def smooth_rate(rate: float, new_bytes: int, seconds: float) -> float:
    """The recent rate after `seconds` with `new_bytes` written: an average in which 30 seconds ago counts half."""
    if seconds <= 0:
        return rate
    keep = math.exp2(-seconds / RATE_HALF_LIFE)
    return rate * keep + (new_bytes / seconds) * (1.0 - keep)
