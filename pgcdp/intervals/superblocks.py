"""The first block of each volume, of an encrypted image: the engine reads a plain one by itself (FORMAT.md 4.1)."""

from __future__ import annotations

import logging

from pgcdp.errors import DamageError, PgcdpError
from pgcdp.records import BLOCK, EXTENT_DATA
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import Image
from pgcdp.store.layout import Store

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""The image may begin or end to move meanwhile."""


def superblocks(store: Store) -> tuple[bytes | None, ...]:
    """Of any boundary, in order of volume number; None of one that cannot be read now.

    Damage is logged and costs no interval its index: without the block it is only known later from which write on a
    transaction is durable.
    """
    return tuple(_first_block(store, volume.number) for volume in store.volumes)


def _first_block(store: Store, volume: int) -> bytes | None:
    damage: DamageError | OSError | None = None
    for _ in range(ATTEMPTS):
        try:
            image = Image.open(store, cut_short=True)
            try:
                moving = None if image.state.to is None else _before_the_move(store, image.state.to, volume)
                return image.read_blocks(volume, 0, 1) if moving is None else moving
            finally:
                image.close()
        except (DamageError, OSError) as error:
            damage = error
        except PgcdpError:  # there is no image yet, or what it moved to was joined with others just now
            damage = None
    if damage is not None:
        log.warning("the first block of volume %s cannot be read: %s", store.volumes[volume].name, damage)
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
