"""The first block of each volume, of an encrypted image: the engine reads a plain one by itself (FORMAT.md 4.1)."""

from __future__ import annotations

from contextlib import suppress

from pgcdp.errors import PgcdpError
from pgcdp.records import BLOCK, EXTENT_DATA
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import Image
from pgcdp.store.layout import Store

ATTEMPTS = 3
"""The image may begin or end to move meanwhile."""


def superblocks(store: Store) -> tuple[bytes | None, ...]:
    """Of any boundary, in order of volume number; None of one that cannot be read now."""
    return tuple(_first_block(store, volume.number) for volume in store.volumes)


def _first_block(store: Store, volume: int) -> bytes | None:
    for _ in range(ATTEMPTS):
        with suppress(PgcdpError, OSError):
            image = Image.open(store, cut_short=True)
            try:
                moving = None if image.state.to is None else _before_the_move(store, image.state.to, volume)
                return image.read_blocks(volume, 0, 1) if moving is None else moving
            finally:
                image.close()
    return None


def _before_the_move(store: Store, to: int, volume: int) -> bytes | None:
    """What the block was before the image began to move to boundary `to`; None when the move does not change it."""
    bundle = Bundle.open(store, to)
    extents = bundle.backward_map()
    found = extents[(extents["volume"] == volume) & (extents["block"] == 0)]
    if not len(found):
        return None
    if found[0]["kind"] != EXTENT_DATA:
        return bytes(BLOCK)
    with bundle.backward() as content:
        return content.read(int(found[0]["source"]), BLOCK)
