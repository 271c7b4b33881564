"""SQL files that judge a database: the user's assertions and pgcdp's own checks.

A statement passes when it returns no row, or exactly one row with one true value. A comment `-- name: ...` before it
names it, `-- database: ...` says where it and those after it run, `-- severity: warning` makes a failure a remark
only, `-- needs: ...` says what it takes: "each database" (it runs in all of them), "version N" (N or newer).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgcdp.errors import PreconditionError, UsageError

_TOKEN = re.compile(
    r"""
      (?P<line>--[^\n]*)
    | (?P<open>/\*)
    | (?P<escaped>\b[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z))
    | (?P<text>'(?:[^']|'')*(?:'|\Z))
    | (?P<name>"(?:[^"]|"")*(?:"|\Z))
    | (?P<dollar>(?<![\w$])\$(?:[A-Za-z_\x80-\uffff][\w]*)?\$)
    | (?P<end>;)
    """,
    re.VERBOSE | re.DOTALL,
)
_NOTE = re.compile(r"--\s*(name|database|severity|needs):\s*(.*?)\s*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Assertion:
    """One statement of a file. `database` is None where the file does not say."""

    name: str
    sql: str
    database: str | None = None
    severity: str = "error"
    each_database: bool = False
    since: int = 0


def load(path: Path) -> list[Assertion]:
    """The assertions of a file. Raises PreconditionError when it cannot be read, UsageError when it holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PreconditionError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    found = list(parse(text))
    if not found:
        raise UsageError(
            f"{path} holds no SQL statement", "write queries that return no row, or one true, when all is well"
        )
    return found


def parse(text: str) -> Iterator[Assertion]:
    """The statements of a text with the comments that concern them."""
    database: str | None = None
    for comments, statement in _statements(text):
        notes = dict(note for comment in comments if (note := _note(comment)))
        database = notes.get("database", database)
        needs = notes.get("needs", "")
        since = re.search(r"version\s+(\d+)", needs)
        yield Assertion(
            name=notes.get("name") or _shortened(statement),
            sql=statement,
            database=database,
            severity=notes.get("severity", "error"),
            each_database="each database" in needs,
            since=int(since[1]) if since else 0,
        )


def _note(comment: str) -> tuple[str, str] | None:
    match = _NOTE.match(comment)
    return (match[1].lower(), match[2]) if match else None


def _statements(text: str) -> Iterator[tuple[list[str], str]]:
    """(line comments, statement without its semicolon), for each statement that is more than comments."""
    comments: list[str] = []
    parts: list[str] = []
    at = 0
    while True:
        token = _TOKEN.search(text, at)
        parts.append(text[at : token.start() if token else len(text)])
        if token is None or token.lastgroup == "end":
            statement = "".join(parts).strip()
            if statement:
                yield comments, statement
                comments = []
            parts = []
            if token is None:
                return
            at = token.end()
        elif token.lastgroup == "line":
            comments.append(token[0])
            parts.append(" ")
            at = token.end()
        elif token.lastgroup == "open":
            parts.append(" ")
            at = _end_of_comment(text, token.end())
        else:
            at = token.end() if token.lastgroup != "dollar" else _behind(text, token[0], token.end())
            parts.append(text[token.start() : at])


def _behind(text: str, word: str, start: int) -> int:
    end = text.find(word, start)
    return len(text) if end < 0 else end + len(word)


def _end_of_comment(text: str, start: int) -> int:
    """Block comments nest in Postgres."""
    depth = 1
    for mark in re.compile(r"/\*|\*/").finditer(text, start):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(text)


def _shortened(statement: str, limit: int = 60) -> str:
    line = " ".join(statement.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
