"""SQL to what it does to which tables: enough to look for the transaction that ran it (parsed by pglast)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pglast import ast, parse_sql
from pglast.enums import ObjectType, OnConflictAction
from pglast.parser import ParseError
from pglast.visitors import Visitor

from pgcdp.errors import TargetError, UsageError

Operation = Literal[
    "insert", "update", "delete", "truncate", "create", "drop", "rewrite", "drop schema", "drop database"
]  # fmt: skip

_DROPPED_TABLES = (
    ObjectType.OBJECT_TABLE,
    ObjectType.OBJECT_MATVIEW,
    ObjectType.OBJECT_FOREIGN_TABLE,
)
_TRANSACTION = re.compile(
    r"\s*(begin|start|commit|end|abort|rollback|savepoint|release|prepare\s+transaction|set|show|reset|discard)\b", re.I
)
_MISSING = (" SELECT 0", " SET it = 0")
_COMMANDS: dict[str, Operation] = {"CMD_INSERT": "insert", "CMD_UPDATE": "update", "CMD_DELETE": "delete"}


@dataclass(frozen=True, slots=True)
class Deed:
    """One operation on one object. `schema` None: it is not said; for a schema or a database `name` is its name.

    `instead`: what the same statement may have done there instead, as MERGE does.
    """

    operation: Operation
    name: str
    schema: str | None = None
    instead: tuple[Operation, ...] = ()

    def is_like(self, other: Deed) -> bool:
        """Whether it may be the same, where a schema is not said."""
        same_schema = self.schema is None or other.schema is None or self.schema == other.schema
        common = {self.operation, *self.instead} & {other.operation, *other.instead}
        return self.name == other.name and same_schema and bool(common)

    def __str__(self) -> str:
        return f"{self.operation} {self.name if self.schema is None else f'{self.schema}.{self.name}'}"


def deeds_of(sql: str) -> list[Deed]:
    """What a statement does to tables, schemas, databases. All of them must be found in one transaction.

    Raises TargetError when it cannot be parsed, or does nothing that can be looked for, UsageError for several
    statements. BEGIN and COMMIT around it do not count.
    """
    try:
        statements = _parse(sql)
    except ParseError as error:
        message, at = str(error.args[0]), int(error.args[1] or 0) if len(error.args) > 1 else 0
        raise TargetError(
            f'"{sql}" is not a statement: {message}, at character {at + 1}',
            'give SQL as it was run, such as "DELETE FROM orders"; conditions may be left out',
        ) from None
    asked = [raw.stmt for raw in statements if not isinstance(raw.stmt, ast.TransactionStmt)]
    if len(asked) > 1:
        raise UsageError(f'"{sql}" is {len(asked)} statements', 'give one statement, such as "DELETE FROM orders"')
    found = _all_deeds(statements)
    if not found:
        raise TargetError(
            f'"{sql}" changes no table',
            "what can be looked for: INSERT, UPDATE, DELETE, MERGE, COPY FROM, TRUNCATE, CREATE TABLE, DROP TABLE, "
            "DROP SCHEMA, DROP DATABASE, and what rewrites a table",
        )
    return found


def _parse(sql: str) -> Any:
    """As pglast does; of INSERT and UPDATE the table is enough."""
    try:
        return parse_sql(sql)
    except ParseError:
        for rest in _MISSING:
            with suppress(ParseError):
                return parse_sql(sql.rstrip(" ;\n") + rest)
        raise


def is_statement(text: str) -> bool:
    """Whether a text can be parsed as SQL and says something."""
    try:
        return bool(parse_sql(text))
    except ParseError:
        return False


def telling(texts: Sequence[str], asked: Sequence[Deed] = ()) -> list[str]:
    """Of the statements of a transaction those that did one of the deeds `asked`, else those that change tables.

    When none does that can be seen (it may have been a function that was called), all that are not about the
    transaction itself.
    """
    did = [(text, _deeds_or_none(text)) for text in dict.fromkeys(texts)]
    found = [text for text, deeds in did if any(deed.is_like(other) for deed in deeds for other in asked)]
    found = found or [text for text, deeds in did if deeds]
    return found or [text for text, _ in did if not _TRANSACTION.match(text)]


def _deeds_or_none(text: str) -> list[Deed]:
    try:
        return _all_deeds(_parse(text))
    except ParseError:
        return []


def _all_deeds(statements: Any) -> list[Deed]:
    return list(dict.fromkeys(deed for raw in statements for deed in _deeds(raw.stmt)))


def _deeds(statement: Any) -> Iterator[Deed]:
    inner = _Inner()
    inner(statement)
    for nested in (statement, *inner.found):
        yield from _own_deeds(nested)


class _Inner(Visitor):
    """Statements inside WITH."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def visit_CommonTableExpr(self, _: Any, node: Any) -> None:  # noqa: N802 - pglast calls it by the node's name
        self.found.append(node.ctequery)


def _own_deeds(statement: Any) -> list[Deed]:
    match statement:
        case ast.InsertStmt():
            conflict = statement.onConflictClause
            updates = conflict is not None and conflict.action == OnConflictAction.ONCONFLICT_UPDATE
            return [_on("insert", statement.relation, *(("update",) if updates else ()))]
        case ast.UpdateStmt():
            return [_on("update", statement.relation)]
        case ast.DeleteStmt():
            return [_on("delete", statement.relation)]
        case ast.MergeStmt():
            return _merge(statement)
        case ast.CopyStmt():
            return [_on("insert", statement.relation)] if statement.is_from and statement.relation else []
        case ast.TruncateStmt():
            return [_on("truncate", relation) for relation in statement.relations or ()]
        case ast.DropStmt():
            return _drop(statement)
        case ast.DropdbStmt():
            return [Deed("drop database", str(statement.dbname))]
        case ast.AlterTableStmt():
            return [_on("rewrite", statement.relation)]
        case ast.VacuumStmt():
            full = any(option.defname == "full" for option in statement.options or ())
            return [_on("rewrite", each.relation) for each in statement.rels or ()] if full else []
        case ast.RefreshMatViewStmt():
            if statement.concurrent:
                return [_on("insert", statement.relation, "update", "delete")]
            return [_on("rewrite", statement.relation)]
        case ast.CreateStmt():
            return [_on("create", statement.relation)]
        case ast.CreateTableAsStmt():
            return _created(statement.into)
        case ast.SelectStmt():
            return _created(statement.intoClause)
        case ast.ExplainStmt():
            return _own_deeds(statement.query)
    if type(statement).__name__ in ("ClusterStmt", "RepackStmt") and statement.relation is not None:
        return [_on("rewrite", statement.relation)]
    return []


def _on(operation: Operation, relation: Any, *instead: Operation) -> Deed:
    return Deed(operation, relation.relname, relation.schemaname, instead)


def _created(into: Any) -> list[Deed]:
    return [_on("create", into.rel)] if into is not None else []


def _merge(statement: Any) -> list[Deed]:
    commands = {clause.commandType.name for clause in statement.mergeWhenClauses}
    did = [operation for name, operation in _COMMANDS.items() if name in commands]
    return [_on(did[0], statement.relation, *did[1:])] if did else []


def _drop(statement: Any) -> list[Deed]:
    if statement.removeType == ObjectType.OBJECT_SCHEMA:
        return [Deed("drop schema", each.sval) for each in statement.objects]
    if statement.removeType not in _DROPPED_TABLES:
        return []
    parts = [[part.sval for part in each] for each in statement.objects]
    return [Deed("drop", each[-1], each[-2] if len(each) > 1 else None) for each in parts]
