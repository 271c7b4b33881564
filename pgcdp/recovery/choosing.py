"""What retention would let go of now: of what a store holds, without what must stay. One answer for who looks and who
does it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from pgcdp.fsio import free_space
from pgcdp.recovery.sweeping import waiting_bytes
from pgcdp.store.base import latest_before, read_base
from pgcdp.store.image import read_state
from pgcdp.store.kept import kept_marks, verified_boundaries
from pgcdp.store.layout import Store
from pgcdp.store.open_views import seen_views
from pgcdp.store.published import published
from pgcdp.store.retention import Holding, Pins, Plan, Policy, Step, choose


@dataclass(frozen=True)
class Choice:
    """What would go, in stages: each is looked at again before it is done (`store.retention.choose`).

    `makes_room`: it is not what the policy says, but makes room. `missing`: bytes that are missing to `least_free`.
    `kept_for`: what keeps the oldest that must stay, "" for nothing but its being the newest.
    """

    holding: Holding | None = None
    pins: Pins | None = None
    stages: list[Plan] = field(default_factory=list)
    makes_room: bool = False
    missing: int = 0
    kept_for: str = ""

    def together(self) -> Plan:
        """All stages as one plan."""
        base = max((each.base for each in self.stages if each.base is not None), default=None)
        return Plan(
            base,
            tuple(span for each in self.stages for span in each.joins),
            tuple(number for each in self.stages for number in each.thin if number > (base or 0)),
        )


def holding_of(store: Store) -> Holding | None:
    """What a store holds; None while its first image is not complete."""
    while True:
        base = read_base(store)
        known = published(store)
        latest = latest_before(store)
        if read_base(store) == base:
            break
    if base is None:
        return None
    indexed = frozenset(number for number, each in known.items() if each.indexed)
    return Holding(base, [each.interval for each in known.values()], indexed, latest)


def pins_of(store: Store, holding: Holding) -> Pins:
    """What must stay now. Raises DamageError when what may say so is damaged."""
    shown = frozenset(view.write for view in seen_views(store))
    there = {boundary.number for boundary in holding.boundaries()}
    return Pins(
        at=read_state(store).boundary,
        points=shown | {kept.write for kept in kept_marks(store)},
        verified=max(verified_boundaries(store) & there, default=None),
        shown=shown,
    )


def would_go(
    store: Store, policy: Policy, now_ns: int, free: int | None = None, *,
    may_make: bool = True, may_join: bool = True, avoid: Collection[Step] = (),
) -> Choice:  # fmt: skip
    """What goes by a policy. `free`: bytes that are free in the store, or will be (None: look); else as `choose`."""
    holding = holding_of(store)
    if holding is None:
        return Choice()
    if free is None:
        free = free_space(store.path) + waiting_bytes(store)
    pins = pins_of(store, holding)
    missing = max(0, policy.least_free - free) if policy.least_free else 0
    stages, makes_room = choose(
        holding, policy, pins, now_ns, missing, may_make=may_make, may_join=may_join, avoid=avoid
    )
    return Choice(holding, pins, stages, makes_room, missing, _kept_for(store, holding, pins))


def _kept_for(store: Store, holding: Holding, pins: Pins) -> str:
    """The oldest of what must stay, in words."""
    found = [(kept.write, f'the kept mark "{kept.name}" at write {kept.write}') for kept in kept_marks(store)]
    found += [(write, f"an open view of write {write}") for write in pins.shown]
    found += [
        (each.write, f"boundary {each.number}, the newest verified one")
        for each in holding.boundaries() if each.number == pins.verified
    ]  # fmt: skip
    return min([(write, words) for write, words in found if write >= holding.base.write], default=(0, ""))[1]
