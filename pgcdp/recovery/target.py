"""SIGNATURES FIRST. Target + listing -> recovery point; pure."""
from __future__ import annotations
from collections.abc import Callable, Sequence
from dataclasses import dataclass
import numpy as np
from numpy.typing import NDArray
from pgcdp.records import Boundary, Interval, RecoveryPoint, Target

@dataclass(frozen=True, slots=True)
class Listing:
    """What exists. base: the oldest boundary that can be restored (0: end of the baseline). intervals: sorted, contiguous from base.
    newest_write: newest restorable write, also of the journal. times(n): wall_ns of each write of interval n,
    times(None): of the writes after the last boundary up to newest_write."""
    base: Boundary; intervals: Sequence[Interval]; newest_write: int; times: Callable[[int | None], NDArray[np.int64]]
def resolve(target: Target, listing: Listing) -> RecoveryPoint: """TargetError when there is none. A point at boundary k has interval=k, boundary=k."""
