"""Of a test's variants one is taken: a fault that all of them would find is found, and no test is lost for another."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.variants import Case, left_out, split


def taken(cases: list[Case]) -> list[Case]:
    out = left_out(cases)
    return [case for place, case in enumerate(cases) if place not in out]


def test_each_test_stays_once() -> None:
    cases = [
        Case("test_a", {"pg_binaries": version, "fs": fs, "steps": steps})
        for version, fs, steps in product(range(3), range(2), range(4))
    ]
    assert sorted(case.values["steps"] for case in taken(cases)) == [0, 1, 2, 3]


def test_what_only_one_parameter_tells_apart_is_not_the_same() -> None:
    cases = [Case("test_a", {"how": 0}), Case("test_a", {"how": 1}), Case("test_b", {"how": 0})]
    assert taken(cases) == cases


def test_over_many_tests_every_variant_is_met() -> None:
    cases = [Case(f"test_{n}", {"pg_binaries": version}) for n in range(60) for version in range(3)]
    met = [sum(case.values["pg_binaries"] == version for case in taken(cases)) for version in range(3)]
    assert sum(met) == 60
    assert min(met) > 10


def test_it_is_the_same_in_every_process() -> None:
    """Both workers must have the same tests: a hash that begins anew in each process would not give them."""
    cases = [Case(f"test_{n}", {"fs": fs}) for n in range(8) for fs in range(2)]
    assert [case.values["fs"] for case in taken(cases)] == [1, 1, 0, 0, 0, 0, 1, 1]


def item(name: str, fs: int, *marks: str) -> Any:
    return SimpleNamespace(
        nodeid=f"{name}[{fs}]", path=Path("tests/cluster/test_a.py"), callspec=SimpleNamespace(indices={"fs": fs}),
        iter_markers=lambda: [SimpleNamespace(name=mark) for mark in marks],
    )  # fmt: skip


@pytest.mark.parametrize("mark", ["skip", "skipif", "soak", "every_variant"])
def test_one_that_may_not_run_does_not_stand_for_one_that_does(mark: str) -> None:
    for number in range(20):
        both = cast(list[pytest.Item], [item(f"test_{number}", 0, mark), item(f"test_{number}", 1)])
        assert split(both) == (both, [])
