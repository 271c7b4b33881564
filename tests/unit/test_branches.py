"""Branches: what a rewind leaves behind is not on the current one, and comes back with an undo."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcdp.errors import DamageError, TargetError
from pgcdp.records import REWIND_BEGIN, REWIND_END, Rewind
from pgcdp.recovery.branches import Stretch, beyond, branch_at, current_branch, on_branch, refuse_inside, share
from pgcdp.store.rewinds import pair, point_name


def on(write: int, lsn: int, branch: list[Stretch]) -> bool:
    return bool(on_branch(np.array([write]), np.array([lsn]), branch)[0])


def members(upto: int, branch: list[Stretch]) -> set[int]:
    writes = np.arange(1, upto + 1)
    return set(writes[on_branch(writes, np.ones(upto), branch)].tolist())


@given(seed=st.integers(0, 10**6))
def test_a_branch_is_what_a_copy_of_the_volume_would_have_seen(seed: int) -> None:
    """The model keeps, for each point, the set of writes that its volumes are made of."""
    chooser = random.Random(seed)
    rewinds: list[Rewind] = []
    made_of: dict[int, frozenset[int]] = {0: frozenset()}
    write, now = 0, frozenset[int]()
    for _ in range(chooser.randrange(1, 8)):
        for _ in range(chooser.randrange(1, 6)):
            write += 1
            now |= {write}
            made_of[write] = now
        target = chooser.choice(sorted(made_of))
        begin = write + 1
        write = begin + chooser.randrange(1, 5)
        rewinds.append(Rewind(begin, write, target))
        now = made_of[target]
        made_of[write] = now
    for point, expected in made_of.items():
        branch = branch_at(point, None, rewinds)
        ends = {rewind.end for rewind in rewinds}
        found = members(write, branch) - ends
        assert found == expected, (point, rewinds)
        for other, others in made_of.items():
            apart = beyond(branch, branch_at(other, None, rewinds))
            assert members(write, apart) - ends == expected - others


def test_of_the_write_that_was_cut_only_what_lies_before_the_lsn_stays() -> None:
    branch = current_branch([Rewind(80, 95, 50, 1000)])
    assert [on(50, lsn, branch) for lsn in (999, 1000, 1001)] == [True, False, False]
    assert [on(write, 2000, branch) for write in (49, 51, 79, 94, 95, 96)] == [True, *[False] * 3, True, True]


def test_while_a_rewind_has_not_ended_the_branch_is_the_one_it_left() -> None:
    branch = current_branch([Rewind(80, None, 50)])
    assert [on(write, 1, branch) for write in (50, 79, 80, 81)] == [True, True, False, False]


def test_points_inside_are_refused_with_the_nearest() -> None:
    rewinds = [Rewind(80, 95, 50), Rewind(120, None, 70)]
    for write in (1, 79, 95, 96, 119):
        refuse_inside(write, rewinds)
    for write in (80, 94):
        with pytest.raises(TargetError, match="writes 80 to 94") as caught:
            refuse_inside(write, rewinds)
        assert "--target-write 79 " in str(caught.value.hint)
        assert "--target-write 95 " in str(caught.value.hint)
    with pytest.raises(TargetError) as caught:
        refuse_inside(120, rewinds)
    assert "--target-write 119 " in str(caught.value.hint)


def test_a_rewind_begun_again_after_a_kill_is_one() -> None:
    first, second = point_name(50, None), point_name(60, 0x176CE10)
    said = [(REWIND_BEGIN, 80, first), (REWIND_BEGIN, 90, first), (REWIND_END, 95, first), (REWIND_BEGIN, 97, second)]
    assert pair(said) == [Rewind(80, 95, 50), Rewind(97, None, 60, 0x176CE10)]
    for wrong in ([(REWIND_END, 95, first)], [(REWIND_BEGIN, 80, "yesterday")]):
        with pytest.raises(DamageError):
            pair(wrong)


def test_what_lies_beyond_a_point_between_two_commits_of_one_write() -> None:
    current = current_branch([])
    apart = beyond(current, branch_at(50, 1000, []))
    assert [on(50, lsn, apart) for lsn in (999, 1000)] == [False, True]
    assert [on(write, 1, apart) for write in (49, 51)] == [False, True]
    assert beyond(branch_at(50, 1000, []), current) == []


def test_how_much_of_an_interval_lies_on_a_branch() -> None:
    branch = current_branch([Rewind(80, 95, 50, 1000)])
    shares = {(1, 49): True, (1, 50): None, (1, 51): None, (51, 79): False, (79, 100): None, (95, 100): True}
    assert {bounds: share(*bounds, branch) for bounds in shares} == shares
