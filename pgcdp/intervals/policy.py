"""SIGNATURES FIRST. When to cut; pure."""
from __future__ import annotations
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

DEFAULT_CUT = ("checkpoint", "5min", "1G")
@dataclass(frozen=True, slots=True)
class Policy:
    own_checkpoints: bool = False
    period_seconds: float | None = None
    quantity_bytes: int | None = None
    rate_bytes_per_second: float | None = None
@dataclass(frozen=True, slots=True)
class Progress:
    """Of the open interval: seconds since the last boundary, writes and bytes since, recent rate (see smooth_rate),
    checkpoint_seen: one of Postgres's own checkpoints completed in it; checkpoint_asked: one that we asked for is under way."""
    seconds: float; writes: int; bytes_written: int; rate: float = 0.0; checkpoint_seen: bool = False; checkpoint_asked: bool = False
Reason = Literal["checkpoint", "period", "quantity", "rate"]
@dataclass(frozen=True, slots=True)
class Decision:
    """action: "wait" | "cut" (close at the checkpoint seen) | "ask" (ask Postgres for a checkpoint, close there)."""
    action: Literal["wait", "cut", "ask"]; reason: Reason | None = None
def parse_policy(words: Sequence[str]) -> Policy: ...
def decide(policy: Policy, progress: Progress) -> Decision: ...
def smooth_rate(rate: float, new_bytes: int, seconds: float) -> float: ...
