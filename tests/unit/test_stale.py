"""Journals drawn at random, by the specification alone: exactly what must be on the volumes is compared."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pgcdp import fsio
from pgcdp.capture import same_parts, stale
from pgcdp.config import Config
from pgcdp.errors import PreconditionError
from tests.journal_writer import BLOCK, DISCARD, MARK, WRITE, ZERO, JournalWriter, Op

SET_ID = bytes(range(16))
SIZES = {"data": 200, "wal": 40}
"""Blocks of the volumes."""


def drawn(rng: random.Random) -> Op:
    """Some of them overlap what came before, in the same batch as well."""
    kind = rng.choices([WRITE, ZERO, DISCARD, MARK], [80, 8, 8, 4])[0]
    if kind == MARK:
        return Op(MARK, data=b"a name")
    volume = rng.randrange(2)
    blocks = rng.randint(1, 6)
    at = rng.randrange(list(SIZES.values())[volume] - blocks)
    data = rng.randbytes(blocks * BLOCK) if kind == WRITE else b""
    return Op(kind, volume, at * BLOCK, blocks * BLOCK, data)


def blocks_of(op: Op) -> dict[tuple[int, int], bytes]:
    """What it leaves in each block."""
    content = op.data if op.kind == WRITE else bytes(op.length)
    return {
        (op.volume, (op.offset + at) // BLOCK): content[at : at + BLOCK]
        for at in (range(0, op.length, BLOCK) if op.kind != MARK else ())
    }


@pytest.mark.parametrize("seed", range(40))
def test_exactly_what_was_written_last_before_the_mark_counts(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    writer = JournalWriter(tmp_path / "journal", SET_ID, segment_bytes=1 << 19)
    batches = [[drawn(rng) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(2, 60))]
    mark = rng.randrange(len(batches))
    must: dict[tuple[int, int], bytes] = {}
    behind: set[tuple[int, int]] = set()
    ends = []
    for number, ops in enumerate(batches):
        if number and rng.random() < 0.1:
            writer.given_up(ops)
        ends.append(writer.append(ops).last)
        for op in ops:
            if number <= mark:
                must |= blocks_of(op)
            else:
                behind |= set(blocks_of(op))
    writer.torn([drawn(rng)], BLOCK)
    writer.mark(ends[mark], ends[mark], ends[mark])
    keep = [each for each in writer.placed if each.last > ends[mark] - rng.choice([10, 1000])]
    for segment in range(1, min(each.segment for each in keep)):
        writer.path(segment).unlink()
    there = [each.number for each in writer.placed if writer.path(each.segment).exists()]
    known = set[tuple[int, int]]()
    for number in range(min(there) - 1, mark + 1):
        for op in batches[number]:
            known |= set(blocks_of(op))
    config = a_set(tmp_path)
    fsio.write_json(config.journal / same_parts.IDENTITY, {"id": "x"})
    config.paths.state.mkdir()
    parts = {"journal": "x", "mark": 1, "volumes": {}, "taken_at": 0}
    fsio.write_json(config.paths.state / same_parts.FILE, parts)
    for number, volume in enumerate(config.volumes):
        content = bytearray(rng.randbytes(volume.bytes))
        for (of, block), data in must.items():
            if of == number and (of, block) not in behind:
                content[block * BLOCK : (block + 1) * BLOCK] = data
        volume.backing.write_bytes(content)
    stale.refuse_stale(config)
    asked = sorted(known - behind)
    for number, block in rng.sample(asked, min(5, len(asked))):
        with config.volumes[number].backing.open("r+b") as file:
            was = os.pread(file.fileno(), BLOCK, block * BLOCK)
            os.pwrite(file.fileno(), was[:-1] + bytes([was[-1] ^ 1]), block * BLOCK)
            of = sum(each[0] == number for each in asked)
            with pytest.raises(PreconditionError, match=f": 1 of {of} blocks that were compared"):
                stale.refuse_stale(config)
            os.pwrite(file.fileno(), was, block * BLOCK)
    stale.refuse_stale(config)


def a_set(root: Path) -> Config:
    paths = SimpleNamespace(state=root / "state")
    for name in ("extend", "heal", "rewind"):
        setattr(paths, f"{name}_state", paths.state / name)
    volumes = tuple(
        SimpleNamespace(name=name, backing=root / name, bytes=blocks * BLOCK, device=False)
        for name, blocks in SIZES.items()
    )
    return cast(Config, SimpleNamespace(
        name="main", journal=root / "journal", paths=paths, volumes=volumes, set_id_bytes=SET_ID
    ))  # fmt: skip
