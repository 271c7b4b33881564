"""Names as people type them: quoted or not; and what is offered for one that is not known."""

from __future__ import annotations

import pytest

from pgcdp.recovery.nearest import dotted_name, nearest, split_name


@pytest.mark.parametrize(
    ("text", "schema", "name"),
    [
        ("orders", None, "orders"),
        ("sales.orders", "sales", "orders"),
        ("Order Items", None, "Order Items"),
        ('"Order Items"', None, "Order Items"),
        ('sales."Order Items"', "sales", "Order Items"),
        ('"a.b"."c.d"', "a.b", "c.d"),
        ('"say ""hi"""', None, 'say "hi"'),
        ('say "hi"', None, 'say "hi"'),
        ("a.b.c", "a.b", "c"),
        ('"', None, '"'),
    ],
)
def test_quotes_are_not_part_of_a_name(text: str, schema: str | None, name: str) -> None:
    assert split_name(text) == (schema, name)


@pytest.mark.parametrize("schema", ["sales", "Sales", "a.b", 'say "hi"', "1st"])
@pytest.mark.parametrize("name", ["orders", "Orders", "Order Items", "a.b", '"', "straße"])
def test_a_name_that_is_shown_can_be_typed(schema: str, name: str) -> None:
    assert split_name(dotted_name(schema, name)) == (schema, name)


def test_the_same_name_elsewhere_comes_first() -> None:
    known = [("a", "order"), ("b", "orders"), ("c", "Orders"), ("a", "orders"), ("d", "ordres"), ("e", "else")]
    assert nearest("orders", known)[:4] == ["a.orders", "b.orders", 'c."Orders"', "a.order"]
    assert nearest("ORDERS", known)[:3] == ['c."Orders"', "a.orders", "b.orders"]
    assert nearest("zzz", known) == ['c."Orders"', "e.else", "a.order", "a.orders", "b.orders"]
    assert nearest("x", []) == []
