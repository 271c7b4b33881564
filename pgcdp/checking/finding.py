"""One result of `pgcdp check`, and the running of several looks one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.progress import Progress, Report
from pgcdp.records import Check, Remark

Step = tuple[str, Callable[[], Iterator["Finding"]]]


@dataclass(frozen=True, slots=True)
class Finding:
    """A check, of which kind a failure is, what mends it, and whether it is a warning: then the check is ok."""

    check: Check
    kind: str | None = None
    hint: str | None = None
    warning: bool = False

    def as_json(self) -> dict[str, Any]:
        """An element of "checks"."""
        return {**asdict(self.check), "warning": self.warning, "kind": self.kind, "hint": self.hint}


def passed(name: str, detail: str) -> Finding:
    return Finding(Check(name, True, 0.0, detail))


def warned(name: str, detail: str, hint: str | None) -> Finding:
    """The promise holds, but for what is said; the hint says how to mend it, or that it mends itself."""
    return Finding(Check(name, True, 0.0, detail), hint=hint, warning=True)


def failed(
    name: str, detail: str, hint: str | None, kind: str = PreconditionError.kind, started: float | None = None
) -> Finding:
    """`started`: when the look began, on the monotonic clock."""
    seconds = 0.0 if started is None else time.monotonic() - started
    return Finding(Check(name, False, seconds, detail), kind, hint)


def of_remarks(remarks: Iterable[Remark]) -> Iterator[Finding]:
    """The same, as lower floors tell it."""
    for each in remarks:
        if each.level == "failure":
            yield failed(each.name, each.detail, each.hint)
        else:
            yield Finding(Check(each.name, True, 0.0, each.detail), hint=each.hint, warning=each.level == "warning")


def run(steps: Iterable[Step], progress: Report) -> list[Finding]:
    """All of them. Raises nothing: what is wrong is in the list."""
    found: list[Finding] = []
    for name, step in steps:
        progress(Progress(f"checking {name}"))
        started = time.monotonic()
        try:
            found.extend(step())
        except PgcdpError as error:
            found.append(failed(name, error.message, error.hint, error.kind, started))
        except OSError as error:  # a disk that is gone
            found.append(failed(name, str(error), "see whether it is mounted", started=started))
    return found
