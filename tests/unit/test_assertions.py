"""How a file of SQL is cut into assertions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcdp.errors import PreconditionError, UsageError
from pgcdp.recovery.assertions import load, parse

ROOT = Path(__file__).resolve().parents[2]


def test_names_and_places() -> None:
    found = list(
        parse(
            "-- name: none is negative\nselect 1 where false;\n\n-- just a remark\nselect true;"
            "-- database: shop\n-- name: in shop\nselect 2;\n-- severity: warning\n"
            "-- needs: each database, version 16\nselect 3 -- not the end;\n;;"
        )
    )
    assert [(each.name, each.database) for each in found] == [
        ("none is negative", None),
        ("select true", None),
        ("in shop", "shop"),
        ("select 3", "shop"),
    ]
    assert (found[3].severity, found[3].each_database, found[3].since) == ("warning", True, 16)
    assert not found[0].each_database


@pytest.mark.parametrize(
    "statement",
    [
        "select 'a;b', 'it''s;'",
        'select ";" from "a;""b"',
        "do $$ begin; end; $$",
        "do $tag$ $$;$$ ; $tag$",
        r"select e'\';'",
        "select $1, a$b$c",
        "select 'unfinished;",
    ],
)
def test_semicolons_that_do_not_end(statement: str) -> None:
    assert [each.sql for each in parse(statement)] == [statement]


def test_comments_may_nest() -> None:
    assert [each.sql for each in parse("select /* ; /* ; */ ; */ 1; -- ; \nselect 2")] == ["select   1", "select 2"]


@given(st.lists(st.sampled_from(["'", '"', "$$", "$a$", ";", "--", "\n", "/*", "*/", "select", " ", "e'", "\\"])))
def test_any_text_ends(words: list[str]) -> None:
    assert all(each.sql.strip() for each in parse("".join(words)))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="cannot read"):
        load(tmp_path / "none.sql")
    (tmp_path / "empty.sql").write_text("-- nothing;\n;;")
    with pytest.raises(UsageError, match="holds no SQL statement"):
        load(tmp_path / "empty.sql")


@pytest.mark.parametrize("file", sorted((ROOT / "sql" / "checks").glob("*.sql")), ids=lambda file: file.stem)
def test_own_checks_have_a_header(file: Path) -> None:
    (only,) = load(file)
    assert file.read_text().startswith(f"-- name: {only.name}\n-- severity: {only.severity}\n")
    assert only.severity in ("error", "warning")
