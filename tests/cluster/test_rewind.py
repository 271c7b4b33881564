"""Production rewound in place: right where it went to, and every time brought back."""

from __future__ import annotations

from typing import Any

import pytest

from pgcdp import api
from pgcdp.errors import TargetError
from pgcdp.postgres import cluster
from pgcdp.records import Target
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet


def agreed(resolved: dict[str, Any]) -> None:
    """Yes to everything."""


def rewind(found: ProtectedSet, target: Target) -> dict[str, Any]:
    told: dict[str, Any] = api.rewind(found.name, target, agree=agreed)
    assert told["verified"]
    return told


def undo(found: ProtectedSet, told: dict[str, Any]) -> dict[str, Any]:
    return rewind(found, Target("name", name=told["undo"]))


def ledger(found: ProtectedSet) -> list[int]:
    return [row[0] for row in found.sql("select n from ledger order by n")]


def timeline(found: ProtectedSet) -> int:
    return cluster.read_control(found.pgdata).timeline


def test_rewind_and_undo(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20)
    found.sql("create table ledger (n int primary key)")
    found.sql("insert into ledger select generate_series(1, 100)")
    point = found.durable()
    found.sql("insert into ledger select generate_series(101, 200)")
    api.cut(found.name)
    found.sql("drop table ledger")
    told = rewind(found, Target("write", point))
    assert ledger(found) == list(range(1, 101))
    assert timeline(found) == 2
    back = undo(found, told)
    assert found.sql("select to_regclass('ledger')") == [(None,)]
    assert timeline(found) == 3
    undo(found, back)
    assert ledger(found) == list(range(1, 101))
    assert timeline(found) == 4
    with pytest.raises(TargetError, match="inside a rewind in place"):
        found.source().resolve(Target("write", found.source().rewinds()[0].begin))
