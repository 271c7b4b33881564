"""What is said of changes that the journal lacks, because it could not grow (on_full = track)."""

from __future__ import annotations

from typing import Any

from pgcdp.capture.control import EngineStatus, Tracked
from pgcdp.records import BLOCK
from pgcdp.units import format_size, format_time


def told(tracked: Tracked) -> str:
    """One line for status and check."""
    doing = "they are brought into the journal now" if tracked.healing else "production runs on"
    return (
        f"{format_size(tracked.blocks * BLOCK)} changed behind write {tracked.behind}, since "
        f"{format_time(tracked.since_ns)}, are missing in the journal; {doing}. "
        "No point is there until the set has healed"
    )


def as_json(status: EngineStatus | None) -> dict[str, Any] | None:
    """As docs/json.md has it; None while nothing is tracked, or no engine runs."""
    tracked = None if status is None else status.tracked
    if tracked is None:
        return None
    return {
        "behind_write": tracked.behind,
        "since": format_time(tracked.since_ns),
        "blocks": tracked.blocks,
        "healing": tracked.healing,
    }
