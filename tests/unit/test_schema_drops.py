"""The name of a schema whose row was not known when it was deleted: by what two looks at the catalogs differ in."""

from __future__ import annotations

from pgcdp.intervals.events import name_drops
from pgcdp.postgres.relations import Look, SchemaDrop

BEFORE = {(5, 100): "a", (5, 101): "b", (5, 2200): "public", (6, 100): "elsewhere"}


def look(*missing: tuple[int, int]) -> Look:
    return Look(0, {5: "shop", 6: "other"}, {key: name for key, name in BEFORE.items() if key not in missing}, {}, ())


def named(drops: dict[int, SchemaDrop], *missing: tuple[int, int]) -> list[str]:
    return [drop.name for drop in name_drops(drops, set(drops), look(), look(*missing)).values()]


def test_one_schema_is_missing() -> None:
    assert named({1: SchemaDrop(9, 5)}, (5, 100), (6, 100)) == ["a"]
    assert named({1: SchemaDrop(9, 5), 2: SchemaDrop(9, 5, 101, "b")}, (5, 100), (5, 101)) == ["a", "b"]


def test_several_or_none_are_missing() -> None:
    assert named({1: SchemaDrop(9, 5)}, (5, 100), (5, 101)) == [""]
    assert named({1: SchemaDrop(9, 5), 2: SchemaDrop(9, 5)}, (5, 100)) == ["", ""]
    assert named({1: SchemaDrop(9, 5)}, (6, 100)) == [""]
    assert [each.name for each in name_drops({1: SchemaDrop(9, 5)}, {1}, look(), None).values()] == [""]
    assert name_drops({1: SchemaDrop(9, 5)}, set(), look(), look((5, 100))) == {}
