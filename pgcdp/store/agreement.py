"""Whether the image of a store is of the boundary that its state names, told from the increments on both sides of it.

A copy that was made while the store was written may have blocks of one moment and a state of another. Each block fits
its own sum then, so nothing else notices: it is as it was, only not then. What an interval left in a block is in its
forward increment, and what the next one found there in its backward increment; an image at the boundary between them
has both. So blocks of two intervals on each side are compared, all of them or some spread over all.

What is damaged or cannot be read is passed over here: that is told where it is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgcdp.errors import DamageError, PreconditionError, TargetError
from pgcdp.records import BLOCK, EXTENT_DATA, Span
from pgcdp.store.bundle import Bundle
from pgcdp.store.frames import FrameReader
from pgcdp.store.image import Image
from pgcdp.store.image_lock import image_held
from pgcdp.store.layout import Store

INTERVALS = 2
"""So many are looked at on each side."""
BLOCKS = 2048
"""At most so many blocks of an increment are compared."""
ROUNDS = 8
"""Each compares as many, spread over all: whatever time there is, it is not for one end of the image alone."""
SECONDS = 2.0
AGAIN = (
    "copy the store again, behind pgcdp down or from a snapshot; if image/ was brought back, bring all of it back as "
    "of one moment"
)

_VOLUME_SHIFT = 46
_Keys = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A block of the image that is not what an interval says: file, offset, and that in words."""

    file: Path
    offset: int
    message: str


@dataclass(frozen=True)
class _Side:
    """Blocks that an increment has as they must be in the image, in rounds."""

    bundle: Bundle
    content: FrameReader
    rounds: Sequence[NDArray[np.void]]


def disagreement(store: Store) -> Disagreement | None:
    """A block that shows that the image is not of the boundary that its state names; None: none was found.

    Takes about SECONDS at most. DamageError or PreconditionError where there is no state, or no image.
    """
    until = time.monotonic() + SECONDS
    with image_held(store), ExitStack() as stack:
        image = Image.open(store, cut_short=True)
        stack.callback(image.close)
        if image.state.state == "baseline":
            return None
        sides = list(_sides(store, image, stack))
        for number in range(ROUNDS):
            for side in sides:
                for row in side.rounds[number]:
                    if time.monotonic() > until:
                        return None
                    if _differs(image, side, row):
                        return _told(image, side, row)
    return None


def refuse_disagreement(store: Store) -> None:
    """Raises PreconditionError for a store whose image is of another moment than its state says."""
    found = disagreement(store)
    if found is not None:
        raise PreconditionError(found.message, AGAIN)


def _sides(store: Store, image: Image, stack: ExitStack) -> Iterator[_Side]:
    """The forward increments of the intervals up to the image's boundary, and the backward ones of those behind it.

    A block that one nearer to the image names, too, is judged by that one; blocks on the move are by none.
    """
    spans, state = store.spans(), image.state
    moving = [] if state.to is None else [span for span in spans if span.last == state.to]
    if state.to is not None and not moving:
        return
    before = _following([span for span in reversed(spans) if span.last <= state.boundary], state.boundary, back=True)
    behind = _following(
        [span for span in spans if span.first > (state.to or state.boundary)], state.to or state.boundary
    )
    for forward, found in ((True, before), (False, behind)):
        with suppress(DamageError, TargetError, OSError):  # what lies further away is not told from that alone
            hidden = [_keys(Bundle.at(store, span).backward_map()) for span in moving]
            for span in found:
                bundle = Bundle.at(store, span)
                extents = bundle.forward_map() if forward else bundle.backward_map()
                content = stack.enter_context(bundle.forward() if forward else bundle.backward())
                yield _Side(bundle, content, _rounds(_chosen(extents, hidden)))
                hidden.append(_keys(extents))


def _following(spans: Sequence[Span], boundary: int, *, back: bool = False) -> list[Span]:
    """The first of these, as long as each follows the one before: from `boundary` on, or up to it."""
    found = list[Span]()
    for span in spans[:INTERVALS]:
        if (span.last if back else span.first - 1) != boundary:
            break
        found.append(span)
        boundary = span.first - 1 if back else span.last
    return found


def _keys(extents: NDArray[np.void]) -> tuple[_Keys, _Keys]:
    """First block and block behind of each extent, of all volumes in one order."""
    begin = (extents["volume"].astype(np.int64) << _VOLUME_SHIFT) + extents["block"].astype(np.int64)
    return begin, begin + extents["count"].astype(np.int64)


def _chosen(extents: NDArray[np.void], hidden: Sequence[tuple[_Keys, _Keys]]) -> NDArray[np.void]:
    """Extents of one block each, at most BLOCKS of data and as many of zeros, without those that are `hidden`."""
    data = extents["kind"] == EXTENT_DATA
    rows = np.concatenate([_spread(extents[data]), _spread(extents[~data])])
    at, _ = _keys(rows)
    seen = np.ones(len(rows), dtype=np.bool_)
    for begin, end in hidden:
        if len(begin):
            nearest = np.searchsorted(begin, at, side="right") - 1
            seen &= (nearest < 0) | (at >= end[nearest])
    return rows[seen]


def _spread(extents: NDArray[np.void]) -> NDArray[np.void]:
    """At most BLOCKS blocks of these, evenly spread, as extents of one block."""
    ends = np.cumsum(extents["count"].astype(np.int64))
    total = int(ends[-1]) if len(ends) else 0
    picked = np.arange(total) if total <= BLOCKS else np.linspace(0, total - 1, BLOCKS).astype(np.int64)
    row = np.searchsorted(ends, picked, side="right")
    found = extents[row].copy()
    within = (picked - (ends[row] - found["count"].astype(np.int64))).astype(np.uint64)
    found["block"] += within
    found["source"][found["kind"] == EXTENT_DATA] += within[found["kind"] == EXTENT_DATA] * np.uint64(BLOCK)
    found["count"] = 1
    return found


def _rounds(rows: NDArray[np.void]) -> list[NDArray[np.void]]:
    """Each in the order of the stream, so that a frame is read once."""
    return [part[np.argsort(part["source"], kind="stable")] for part in (rows[n::ROUNDS] for n in range(ROUNDS))]


def _differs(image: Image, side: _Side, row: np.void) -> bool:
    try:
        told = side.content.read(int(row["source"]), BLOCK) if row["kind"] == EXTENT_DATA else bytes(BLOCK)
        return image.read_blocks(int(row["volume"]), int(row["block"]), 1) != told
    except (DamageError, OSError):
        return False


def _told(image: Image, side: _Side, row: np.void) -> Disagreement:
    file, block = image.files(int(row["volume"])).path, int(row["block"])
    message = (
        f"the image is not of boundary {image.state.boundary}, at which it is by its state: {file} has at offset "
        f"{block * BLOCK} another block {block} than interval {side.bundle.number} tells of it; this copy of the "
        "store was made while it was written, or its image is of another moment"
    )
    return Disagreement(file, block * BLOCK, message)
