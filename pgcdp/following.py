"""`pgcdp log --follow`: transactions as they end, on whichever branch production is on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from pgcdp import transactions
from pgcdp.around import last_in
from pgcdp.opening import open_source
from pgcdp.records import Rewind
from pgcdp.recovery.source import Source
from pgcdp.units import parse_lsn

Json = dict[str, Any]

FOLLOW_SECONDS = 1.0
"""How often new transactions are looked for."""


def follow(
    set_name: str,
    waiting: Callable[[], None] = lambda: None,
    rewound: Callable[[Rewind], None] = lambda rewind: None,
    unseen: Callable[[str], None] = lambda said: None,
    **wanted: Any,
) -> Iterator[Json]:
    """The newest transactions, then those that end from now on; `wanted` as `pgcdp.transactions.log`.

    `waiting` is called each time that the set stops. After a rewind in place those of the new branch come; `rewound` is
    called behind the last one of the branch that was left. With a "branch" in `wanted` it stays on that. `unseen` is
    told that there may be others, when that changes: "unseen" of `log`.
    """
    said: str | None = None

    def listed(source: Source, **more: Any) -> list[Json]:
        nonlocal said
        told = transactions.log(source, **{**wanted, **more})
        if "branch" not in more and told["unseen"] != said:
            said = told["unseen"]
            if said is not None:
                unseen(said)
        found: list[Json] = told["transactions"]
        return found

    source = open_source(set_name, None)
    stays = bool(wanted.get("branch"))
    rewinds = _ended(source)
    newest = listed(source)
    yield from reversed(newest)
    seen = parse_lsn(newest[0]["lsn"]) if newest else 0
    wanted["limit"] = None
    read: int | None = -1
    stopped = False
    while True:
        began = time.monotonic()
        source = open_source(set_name, None)
        if source.durable_write is None and not stopped:
            waiting()
        stopped = source.durable_write is None
        if source.durable_write != read:
            read = source.durable_write
            if not stays and (new := _ended(source)[len(rewinds) :]):
                left = listed(source, behind_lsn=seen, branch=_timeline_before(source, new[0]))
                yield from reversed(left)
                rewound(new[-1])
                rewinds += new
                seen = _seen_at(source, new[-1])
            begin = (rewinds[-1].end or 0) if rewinds and not stays else 0
            for each in reversed(listed(source, behind_lsn=seen)):
                if each["write"] > begin:
                    seen = parse_lsn(each["lsn"])
                    yield each
        # What was written since the last boundary is read again each time: a fifth of a core at most goes into that.
        time.sleep(max(FOLLOW_SECONDS, 4 * (time.monotonic() - began)))


def _ended(source: Source) -> list[Rewind]:
    return [rewind for rewind in source.rewinds() if rewind.end is not None]


def _timeline_before(source: Source, rewind: Rewind) -> int:
    """The timeline of the branch that a rewind left: Postgres was shut down at a boundary in front of it."""
    before = [each.boundary.timeline for each in source.intervals() if each.to_write < rewind.begin]
    return before[-1] if before else source.base().timeline


def _seen_at(source: Source, rewind: Rewind) -> int:
    """Up to which LSN at least the branch is the one that was gone back to, and not new."""
    assert rewind.end is not None
    last = last_in(source, rewind.end)
    return 0 if last is None else parse_lsn(last["lsn"])
