"""How long work tells where it is. The use cases call it, the command line draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a step is.

    `step` names it in the words of a DBA, for people ("copying the cluster"); a new name begins a new bar or line.
    `done` and `total` count `unit`s ("bytes", "writes", "blocks", ...); None where it cannot be known.
    A step has ended when the next one begins or when `done` equals `total`, or with `failed`, when it went wrong and
    something else follows, such as cleaning up.
    """

    step: str
    done: int | None = None
    total: int | None = None
    unit: str = "bytes"
    failed: bool = False


Report = Callable[[Progress], None]
"""What use cases take as `progress`. It returns at once, never raises and may be called often."""


def silent(progress: Progress) -> None:
    """The report that says nothing: for callers that do not watch."""
