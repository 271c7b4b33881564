"""What the tests say of a journal under random writers: each record is that of an operation which was under way."""

from __future__ import annotations

from tests.model import BLOCK, DISCARD, Write
from tests.raw_workload import Op, match


def test_of_two_erasures_of_the_same_blocks_the_one_that_ends_first_came_first() -> None:
    later = Op(2, 1, DISCARD, 0, 0, BLOCK, issued=20, answered=60, ended=60)
    first = Op(3, 1, DISCARD, 0, 0, BLOCK, issued=10, answered=40, ended=40)
    records = [Write(number, DISCARD, 0, 0, BLOCK, 0, boot_ns, b"") for number, boot_ns in ((1, 30), (2, 50))]
    assert match([later, first], records) == []
    assert (first.numbers, later.numbers) == ([1], [2])
