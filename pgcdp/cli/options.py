"""Arguments and options that several commands take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pgcdp import keys, units
from pgcdp.errors import PgcdpError, UsageError
from pgcdp.sets import only_set

if TYPE_CHECKING:
    from pgcdp.records import Target

F = TypeVar("F", bound=Callable[..., Any])


_TARGETS: dict[str, Any] = {
    "target_write": "write",
    "target_boundary": "boundary",
    "target_xid": "xid",
    "target_time": "time",
    "target_lsn": "lsn",
    "target_name": "name",
    "before": "before",
}
"""Keyword arguments of `target_options`, and the kinds of targets that they are."""


def write_number(text: str) -> int:
    """The number of a write. Raises UsageError."""
    return _number(text, "write number")


def boundary_number(text: str) -> int:
    """The number of a boundary. Raises UsageError."""
    return _number(text, "boundary number")


def xid_number(text: str) -> int:
    """The number of a transaction. Raises UsageError."""
    return _number(text, "transaction id")


def lsn(text: str) -> int:
    """An LSN. Raises UsageError."""
    return units.parse_lsn(text)


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f'"{text}" is not a {what}', "give a whole number, as status and info print it")
    return int(text)


def examples(*lines: str) -> str:
    """The last part of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def set_argument(required: bool = False) -> Callable[[F], F]:
    """SET. Resolve it with `pick_set`."""
    return click.argument("set_name", metavar="SET" if required else "[SET]", required=required, default=None)


def output_option(function: F) -> F:
    """--output, for every command."""
    return click.option(
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Text for people, or one JSON object on standard output (docs/json.md).",
    )(function)


def search_options(function: F) -> F:
    """--limit, --database and --branch, for commands that list transactions."""
    for option in (
        click.option(
            "--branch",
            type=click.IntRange(1),
            metavar="TIMELINE",
            help="Those on the branch of this timeline, which a rewind in place has left.",
        ),
        click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="How many to show."),
        click.option("--database", metavar="D", help="Only tables of this database."),
    ):
        function = option(function)
    return function


def yes_option(function: F) -> F:
    """--yes, for commands that ask."""
    return click.option("--yes", "-y", is_flag=True, help="Do not ask.")(function)


def store_option(function: F) -> F:
    """--store instead of SET, for commands that need nothing but the store; and where its key is."""
    function = key_options("Where the key of the store is, if it is encrypted")(function)
    return click.option(
        "--store",
        type=click.Path(path_type=Path, file_okay=False, exists=True, resolve_path=True),
        metavar="DIR",
        help="A store instead of SET: nothing else is needed, on any machine.",
    )(function)


def key_options(what: str) -> Callable[[F], F]:
    """--encrypt-key-file and --encrypt-key-command: this process takes the key from there (`keys.give`)."""

    def decorate(function: F) -> F:
        for option in (
            click.option(
                "--encrypt-key-command",
                metavar="CMD",
                expose_value=False,
                callback=_take_key,
                help="Or a command of the shell that prints it.",
            ),
            click.option(
                "--encrypt-key-file",
                type=click.Path(path_type=Path, resolve_path=True),
                metavar="FILE",
                expose_value=False,
                callback=_take_key,
                help=f"{what}: a file with 64 hex digits.",
            ),
        ):
            function = option(function)
        return function

    return decorate


def _take_key(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    given = context.meta.setdefault("pgcdp.keys", {})
    given[parameter.name] = value
    keys.give(keys.source(given.get("encrypt_key_file"), given.get("encrypt_key_command")))


def target_options(function: F) -> F:
    """The target, and --exclusive and --before; put them together with `pick_target`, given all keyword arguments."""
    for option in (
        click.option(
            "--branch",
            type=click.IntRange(1),
            metavar="TIMELINE",
            help="An xid, LSN, time or statement on the branch of this timeline, which a rewind in place has left.",
        ),
        click.option("--exclusive", is_flag=True, help="Just before the target, without it."),
        click.option(
            "--before",
            metavar="SQL",
            help='Just before the one transaction that did this, such as "DELETE FROM orders".',
        ),
        click.option("--target-name", metavar="MARK", help="A mark, or a restore point of Postgres."),
        click.option("--target-lsn", type=lsn, metavar="L", help="The first WAL record at or behind L."),
        click.option(
            "--target-time",
            type=units.parse_time,
            metavar="T",
            help="Just before the first commit later than T; local time unless it names a zone.",
        ),
        click.option("--target-xid", type=xid_number, metavar="N", help="The commit of transaction N."),
        click.option("--target-boundary", type=boundary_number, metavar="N", help="The end of interval N."),
        click.option("--target-write", type=write_number, metavar="N", help="All writes up to write N."),
    ):
        function = option(function)
    return function


def pick_set(name: str | None) -> str:
    """The set that is meant. Raises UsageError when none is named and there is not exactly one."""
    return only_set() if name is None else name


def pick_set_or_store(name: str | None, store: Path | None) -> str | None:
    """The set that is meant, or None when a store is given instead. Raises UsageError for both."""
    if store is None:
        return pick_set(name)
    if name is not None:
        raise UsageError(f"both the set {name} and --store {store} are given", "give one of them")
    return None


def split_set(words: tuple[str, ...], what: str) -> tuple[str, str]:
    """SET and the last word of "[SET] WHAT". Raises UsageError for another number of words."""
    if not words:
        raise UsageError(f"missing argument {what}", "pgcdp --help shows the commands")
    if len(words) > 2:
        raise UsageError(f'unexpected argument "{words[2]}"', f"give SET and {what}, or {what} alone")
    return pick_set(words[0] if len(words) == 2 else None), words[-1]


def last_word(words: tuple[str, ...], what: str) -> str:
    """The one word of a command that was given a store instead of SET. Raises UsageError for another number."""
    if len(words) != 1:
        raise UsageError(f"{len(words)} arguments are given beside --store", f"give {what} alone")
    return words[0]


def pick_target(given: Mapping[str, Any]) -> tuple[Target, str | None]:
    """The target of the options, and the SQL of --before; none of them: the newest write.

    `given`: the keyword arguments of `target_options`. Raises UsageError for more than one.
    """
    from pgcdp.records import Target  # with numpy, which --help does not need

    names = [name for name in _TARGETS if given[name] is not None]
    if len(names) > 1:
        words = " and ".join("--" + name.replace("_", "-") for name in names)
        raise UsageError(f"{words} cannot be given together", "give one target")
    exclusive = bool(given["exclusive"])
    branch = int(given.get("branch") or 0)
    if branch and names not in (["target_xid"], ["target_lsn"], ["target_time"], ["before"]):
        raise UsageError(
            "--branch needs --target-xid, --target-lsn, --target-time or --before", "other targets are on one branch"
        )
    if not names:
        if exclusive:
            raise UsageError("--exclusive needs a target", "--target-xid N --exclusive is just before transaction N")
        return Target("newest"), None
    name, value = names[0], given[names[0]]
    if name == "before":
        return Target("newest", branch=branch), str(value)
    if name == "target_name":
        return Target("name", name=str(value), exclusive=exclusive), None
    return Target(_TARGETS[name], value, exclusive=exclusive, branch=branch), None


def confirm(question: str, yes: bool, output: str) -> None:
    """Ask before something large is done. Raises UsageError where nobody can answer, PgcdpError on a no."""
    if yes:
        return
    if output == "json" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"not confirmed: {question}", "add --yes, or run it on a terminal to be asked")
    if not click.confirm(f"{question}. Go on?", err=True):
        raise PgcdpError("not confirmed, nothing was done", "answer y, or add --yes")
