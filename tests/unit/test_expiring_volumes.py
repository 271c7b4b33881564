"""Retention in a history in which the set changed: data lay outside of it, a volume came later, another one grew."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgcdp.fsio import write_json
from pgcdp.opening import lacking
from pgcdp.records import BLOCK, Span, Target, Volume
from pgcdp.recovery import merged
from pgcdp.recovery.expiring import Run, expiring
from pgcdp.store.base import base_outside
from pgcdp.store.image import Image, add_volume
from pgcdp.store.open_interval import OUTSIDE, OpenInterval
from pgcdp.store.published import published
from pgcdp.store.rebuild import rebuild
from pgcdp.store.retention import Plan
from tests.fix_years import AN_HOUR, EVERYTHING_OLD, Years, carry_out
from tests.journal_writer import DISCARD, WRITE, ZERO, Op
from tests.unit.test_increments import BLOCKS, apply_op, capture, random_op

A, B = ["pg_tblspc/1", "/a"], ["pg_wal", "/b"]
OUTSIDE_OF: dict[int, list[list[str]] | None] = {1: [], 2: [A], 3: [], 4: None, 5: [], 6: [A, B], 7: []}
"""By interval; None: there was no time to look."""


class Outside(Years):
    """Each interval says what lay outside of the set."""

    def before_end(self, opened: OpenInterval) -> None:
        said = OUTSIDE_OF[opened.number]
        if said is not None:
            write_json(opened.path / OUTSIDE, {"outside": said})


def told(years: Years) -> dict[int, list[list[str]] | None]:
    """What the store says; its catalog says the same, and one made anew."""
    found = published(years.store)
    rebuild(years.store)[0].close()
    assert {n: each.interval for n, each in published(years.store).items()} == {n: e.interval for n, e in found.items()}
    said = {number: each.interval.outside for number, each in found.items()}
    return {number: None if rows is None else [list(row) for row in rows] for number, rows in said.items()}


def test_what_an_interval_lacks_it_lacks_thinned_joined_and_as_the_oldest_boundary(tmp_path: Path) -> None:
    years = Outside(tmp_path / "y", 1, [5] * 7, [5] * 7)
    assert told(years) == OUTSIDE_OF
    assert base_outside(years.store) == [], "protect leaves nothing outside"
    carry_out(years, Plan(joins=(Span(1, 3), Span(4, 5)), thin=(6,)))
    assert told(years) == {3: [A], 5: None, 6: [A, B], 7: []}
    source = years.source()
    rows = {number: lacking(source, source.resolve(Target("boundary", number))) for number in (0, 3, 5, 6, 7)}
    assert [None if each is None else len(each) for each in rows.values()] == [0, 1, None, 2, 0]
    carry_out(years, Plan(joins=(Span(1, 5),)))
    assert told(years) == {5: [A], 6: [A, B], 7: []}, "what is known of a part is known of the whole"
    carry_out(years, Plan(base=6))
    assert base_outside(years.store) == [tuple(A), tuple(B)]
    source = years.source()
    assert lacking(source, source.resolve(Target("boundary", 6))) == rows[6]
    assert lacking(source, source.resolve(Target("boundary", 7))) == []
    years.assert_sound()


class Growing(Years):
    """After two intervals a third volume came, after four the first one grew; both are written to since."""

    def __init__(self, place: Path, seed: int) -> None:
        self.blocks = [BLOCKS, BLOCKS]
        super().__init__(place, seed, [6] * 2, AN_HOUR[:2])
        self.world.store = add_volume(self.store, Volume(2, "late", BLOCKS * BLOCK))
        self.blocks.append(BLOCKS)
        self.world.model.append(bytearray(BLOCKS * BLOCK))
        self.go_on(2)
        image = Image.open(self.store, writable=True)
        self.world.store = image.grow(0, 2 * BLOCKS * BLOCK)
        image.close()
        self.blocks[0] = 2 * BLOCKS
        self.world.model[0].extend(bytes(BLOCKS * BLOCK))
        self.go_on(3)

    def go_on(self, count: int) -> None:
        for number in range(self.count + 1, self.count + count + 1):
            self.time_ns += AN_HOUR[min(number, len(AN_HOUR)) - 1] * 60 * 10**9
            ops = [random_op(self.chooser) for _ in range(4)]
            ops += [self.op_on(2) for _ in range(4)]
            ops += [self.op_on(0) for _ in range(4)]
            self.chooser.shuffle(ops)
            capture(self.world, ops, self.chooser)
            self.publish_at(number)
        self.count += count

    def op_on(self, volume: int) -> Op:
        """Anywhere on it, also over the old end."""
        kind = self.chooser.choice([WRITE, WRITE, ZERO, DISCARD])
        begin = self.chooser.randrange(self.blocks[volume])
        count = self.chooser.randrange(1, min(9, self.blocks[volume] - begin) + 1)
        data = self.chooser.randbytes(count * BLOCK) if kind == WRITE else b""
        return Op(kind, volume, begin * BLOCK, count * BLOCK, data)

    def at(self, write: int) -> list[bytes]:
        """A volume that came later, or the part that a volume has grown by, was zeros."""
        model = [bytearray(blocks * BLOCK) for blocks in self.blocks]
        for op in self.world.ops[:write]:
            apply_op(model, op)
        return [bytes(volume) for volume in model]

    def writes_from(self, number: int) -> set[int]:
        """All points from a boundary on."""
        return set(range(self.source().resolve(Target("boundary", number)).write, len(self.world.ops) + 1))


@pytest.mark.parametrize("seed", range(5))
def test_joined_over_a_volume_that_came_and_one_that_grew(tmp_path: Path, seed: int) -> None:
    years = Growing(tmp_path / "y", seed)
    years.assert_only(years.writes_from(0))
    ends = {n: years.source().resolve(Target("boundary", n)).write for n in range(8)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merged, "FANOUT", 2)
        merged.merge_due(years.store)
        carry_out(years, Plan(joins=(Span(2, 3), Span(4, 5))))
        years.assert_only({*range(ends[0], ends[1] + 1), ends[3], ends[5]} | years.writes_from(5))
        carry_out(years, Plan(joins=(Span(2, 5),), thin=(1, 6)))
        years.assert_only({ends[0], ends[1], ends[5]} | years.writes_from(6))
        years.assert_sound()
        for base in (1, 5, 6):
            carry_out(years, Plan(base=base))
            assert years.source().base().number == base
            years.assert_only({end for n, end in ends.items() if n in (1, 5, 6) and n >= base} | years.writes_from(6))
        years.assert_sound()


def test_the_oldest_boundary_is_older_than_a_volume(tmp_path: Path) -> None:
    """... also in a copy of the store, without a journal."""
    years = Growing(tmp_path / "y", 7)
    write = years.source().resolve(Target("boundary", 1)).write
    carry_out(years, Plan(base=1, thin=(2, 3, 4, 5, 6)))
    view = years.mapped(years.source().resolve(Target("boundary", 1)))
    assert [volume.bytes for volume in view.volumes] == [2 * BLOCKS * BLOCK, BLOCKS * BLOCK, BLOCKS * BLOCK]
    assert years.at(write)[2] == bytes(BLOCKS * BLOCK)
    years.assert_only({years.source().resolve(Target("boundary", n)).write for n in range(1, 7)} | years.writes_from(6))
    with expiring(years.store):
        assert not Run(years.store, EVERYTHING_OLD).run(years.time_ns + 10**18).failed
    years.assert_sound()
