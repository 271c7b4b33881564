"""Every error a user can see, in one tree.

    PgcdpError               exit 1   anything else
    ├── UsageError           exit 2   the command line is wrong
    ├── TargetError          exit 3   no such target, or several
    ├── VerificationFailed   exit 4   Postgres on the recovery point is not right
    ├── DamageError          exit 5   stored bytes are not what was written
    ├── PreconditionError    exit 6   something must be mended first; the hint says with which command
    └── BugError             exit 1   pgcdp contradicts itself

Messages are lower case, without full stop, and name the object and the number. The hint is one sentence:
what to type or look at next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class PgcdpError(Exception):
    """Anything that stops a command and is told to the user."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def as_json(self) -> dict[str, dict[str, object]]:
        """The one error shape of `--output json` (docs/json.md)."""
        return {
            "error": {
                "code": self.exit_code,
                "kind": self.kind,
                "message": self.message,
                "hint": self.hint,
            }
        }


class UsageError(PgcdpError):
    """The command line or a setting is wrong; nothing was done."""

    exit_code = 2
    kind = "usage"


class TargetError(PgcdpError):
    """There is no such recovery point, or the target names more than one.

    `candidates`: the transactions to choose from, as docs/json.md has them; `more`: how many others there are.
    """

    exit_code = 3
    kind = "target"

    def __init__(
        self, message: str, hint: str | None = None, candidates: Sequence[Mapping[str, Any]] = (), more: int = 0
    ) -> None:
        super().__init__(message, hint)
        self.candidates = list(candidates)
        self.more = more

    def as_json(self) -> dict[str, dict[str, object]]:
        """With `candidates` and `more` where there are several."""
        told = super().as_json()
        if self.candidates:
            told["error"] |= {"candidates": self.candidates, "more": self.more}
        return told


class UnseenError(TargetError):
    """What is meant may lie where transactions are not known: not indexed, or in WAL that was not seen whole."""


class VerificationFailed(PgcdpError):
    """Postgres was started on the recovery point and a check failed."""

    exit_code = 4
    kind = "verification"


class DamageError(PgcdpError):
    """Stored bytes are not what was written: names file and offset, and what can still be restored."""

    exit_code = 5
    kind = "damage"


class HalfWrittenError(DamageError):
    """Damage that was met while production is down, written back in part; the hint says what brings it back."""


class PreconditionError(PgcdpError):
    """Something outside pgcdp must be mended first."""

    exit_code = 6
    kind = "precondition"


class BugError(PgcdpError):
    """pgcdp contradicts itself; please report it."""

    kind = "bug"
