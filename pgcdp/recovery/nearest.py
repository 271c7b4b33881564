"""Pure: names of tables as people type them, and the names that are nearest to one that is not known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

NEAREST = 5
_BARE = re.compile(r"[a-z_][a-z0-9_$]*")
_QUOTED = re.compile(r'(?:("(?:[^"]|"")+"|[^".]+)\.)?("(?:[^"]|"")+"|[^".]+)')


def split_name(text: str) -> tuple[str | None, str]:
    """Schema (None: not said) and name of [SCHEMA.]NAME, each in double quotes or as it is."""
    match = _QUOTED.fullmatch(text)
    if match is None:  # nothing that quotes would allow
        schema, dot, name = text.rpartition(".")
        return schema if dot else None, name
    return None if match[1] is None else _plain(match[1]), _plain(match[2])


def dotted_name(schema: str, name: str) -> str:
    """SCHEMA.NAME as SQL and `split_name` take it; without a schema it is no name of SQL, and as it is."""
    return f"{_quoted(schema)}.{_quoted(name)}" if schema else name


def _quoted(part: str) -> str:
    return part if _BARE.fullmatch(part) else '"' + part.replace('"', '""') + '"'


def _plain(part: str) -> str:
    return part[1:-1].replace('""', '"') if part.startswith('"') else part


def nearest(name: str, known: Iterable[tuple[str, str]]) -> list[str]:
    """Of (schema, name): first those of the same name, then of the same but for case, then of similar ones.

    Where none is similar, the first ones by name.
    """
    by_name: dict[str, list[str]] = {}
    for schema, each in sorted(known):
        by_name.setdefault(each, []).append(dotted_name(schema, each))
    folded = sorted(each for each in by_name if each != name and each.casefold() == name.casefold())
    similar = difflib.get_close_matches(name, by_name, n=NEAREST, cutoff=0.4)
    names = dict.fromkeys([*([name] if name in by_name else []), *folded, *similar])
    return [dotted for each in names or sorted(by_name) for dotted in by_name[each]][:NEAREST]
