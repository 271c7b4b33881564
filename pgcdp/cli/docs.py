"""Writes the documents that follow from the program itself: `python -m pgcdp.cli.docs docs`.

cli.md from the commands' help, errors.md from the tree of errors, settings.md from the table of settings. A test
compares them with what is committed.
"""

from __future__ import annotations

import inspect
import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

import pgcdp as package
from pgcdp import errors
from pgcdp.cli.main import VERBS, pgcdp
from pgcdp.errors import PgcdpError
from pgcdp.settings_table import documentation

WRITTEN_BY = "<!-- Written by `python -m pgcdp.cli.docs docs`; change the program instead. -->"
WIDTH = 100


def documents() -> dict[str, str]:
    """File name and text of each generated document."""
    return {"cli.md": command_line(), "errors.md": error_tree(), "settings.md": settings()}


def command_line() -> str:
    """cli.md: `--help` of every command."""
    parts = [
        WRITTEN_BY,
        "# The command line",
        "Every command takes `--help`, and `--output json` for programs ([json.md](json.md)). What went wrong is said"
        " on standard error with a hint, and by the exit code ([errors.md](errors.md)).",
        f"```\n{_help(pgcdp, None, 'pgcdp')}\n```",
    ]
    group = click.Context(pgcdp, info_name="pgcdp", max_content_width=WIDTH, terminal_width=WIDTH)
    for verb in VERBS:
        command = pgcdp.get_command(group, verb)
        assert command is not None
        parts += [f"## pgcdp {verb}", f"```\n{_help(command, group, verb)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(command: click.Command, parent: click.Context | None, name: str) -> str:
    context = click.Context(
        command,
        parent=parent,
        info_name=name,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines()).rstrip()


def errors_of_all_rooms() -> list[type[PgcdpError]]:
    """Every error that has an exit code or a kind of its own, those of `pgcdp.errors` first for each code."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    found = [error for error in _with_children(PgcdpError) if {"exit_code", "kind"} & vars(error).keys()]
    return sorted(found, key=lambda error: (error.exit_code, error.__module__ != errors.__name__, error.__name__))


def _with_children(error: type[PgcdpError]) -> Iterator[type[PgcdpError]]:
    yield error
    for child in error.__subclasses__():
        yield from _with_children(child)


def error_tree() -> str:
    """errors.md: exit code, kind and meaning of each error."""
    lines = [
        WRITTEN_BY,
        "",
        "# Errors and exit codes",
        "",
        "An error is told on standard error as `error: ...` and mostly `hint: ...`: what to type or look at next. With",
        "`--output json` it is one object on standard output, as [json.md](json.md) says. The exit code is the same.",
        "",
        "| exit code | kind | class | what it means |",
        "|---|---|---|---|",
        "| 0 | | | done |",
    ]
    for error in errors_of_all_rooms():
        meaning = (inspect.getdoc(error) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
        lines.append(f"| {error.exit_code} | {error.kind} | `{error.__name__}` | {meaning} |")
    lines += [
        "| 130 | | | interrupted with Ctrl-C, after cleaning up |",
        "| 143 | | | ended by SIGTERM, after cleaning up (129 by SIGHUP) |",
        "",
        "`verify` exits 4 and `check` exits 5 or 6 with their whole result printed, since that is what names the",
        "failed checks. An error of kind `bug` is one that nobody foresaw: its traceback is at the end of",
        "`/var/lib/pgcdp/pgcdp.log`, and `PGCDP_DEBUG=1` prints it.",
    ]
    return "\n".join(lines) + "\n"


def settings() -> str:
    """settings.md: every setting of SET.toml."""
    lines = [
        WRITTEN_BY,
        "",
        "# Settings",
        "",
        "`pgcdp protect` writes the settings of a volume set to `/etc/pgcdp/SET.toml` (below `PGCDP_ROOT` when that is",
        "set), each under a comment that says what this table says.",
        "",
        "| setting | default | what it is | a change |",
        "|---|---|---|---|",
    ]
    for name, default, meaning, effect in documentation():
        lines.append(f"| `{name}` | {f'`{default}`' if default else ''} | {meaning} | {effect} |")
    return "\n".join(lines) + "\n"


def main(directory: str) -> None:
    """Write all of them into `directory`."""
    for name, text in documents().items():
        (Path(directory) / name).write_text(text, "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pgcdp.cli.docs DIRECTORY")
    main(sys.argv[1])
