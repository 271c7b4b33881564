"""A recovery point is between two ends of transactions: with 50,000 tables, nobody may wait for their names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pgcdp.intervals.readout import read_nothing
from pgcdp.intervals.transactions import Past, TransactionIndex
from pgcdp.postgres.relations import PG_CLASS, PG_NAMESPACE, Look, Relation, catalogs_among
from pgcdp.store import transactions
from pgcdp.store.transactions import END_COLUMNS, read_look, write_look

RELATIONS = (
    Relation(5, PG_CLASS, "pg_catalog", "pg_class", "r", 1259),
    Relation(5, 16384, "public", "orders", "r", 16390, rows=7),
    Relation(5, PG_NAMESPACE, "pg_catalog", "pg_namespace", "r", 2615),
)
LOOK = Look(99, {5: "shop"}, {(5, 2200): "public"}, catalogs_among(RELATIONS), RELATIONS)


def test_a_look_is_what_was_written(tmp_path: Path) -> None:
    write_look(tmp_path, LOOK)
    found = read_look(tmp_path)
    assert found is not None
    assert found.catalogs == {(5, 1259): PG_CLASS, (5, 2615): PG_NAMESPACE}
    assert len(found.relations) == 3
    assert found.relations[1] == RELATIONS[1]
    assert replace(found, relations=tuple(found.relations)) == LOOK


def test_ends_and_events_make_no_relations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_look(tmp_path, LOOK)
    made: list[Relation] = []

    def make(*row: Any) -> Relation:
        made.append(Relation(*row))
        return made[-1]

    monkeypatch.setattr(transactions, "Relation", make)
    index = TransactionIndex(read_nothing(), Past(read_look(tmp_path)), read_look(tmp_path), 700)
    assert index.ends.column_names == list(END_COLUMNS)
    assert not index.events
    assert "orders" not in {relation.name for relation in made}
    assert index.table.column_names == transactions.SCHEMA.names
    assert index.look is not None
    assert "orders" in {relation.name for relation in index.look.relations}
    assert "orders" in {relation.name for relation in made}
