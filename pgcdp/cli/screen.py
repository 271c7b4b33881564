"""All that reaches the terminal: results on standard output, progress and errors on standard error.

A terminal gets tables and bars (rich), everything else plain lines; `--output json` one object and nothing else.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pgcdp.errors import PgcdpError
from pgcdp.progress import Progress, Report, silent
from pgcdp.units import format_duration, format_size

SECONDS_BETWEEN_LINES = 5.0
"""How often one step may say where it is when there is no terminal."""
LINE = 160
"""Characters of a line of SQL when there is no terminal."""


def result(value: Mapping[str, Any], output: str, render: Callable[[Mapping[str, Any]], None] | None = None) -> None:
    """Print what a use case returned: as JSON, by `render`, or as lines of name and value."""
    if output == "json":
        print(json.dumps(value, ensure_ascii=False), flush=True)
    elif render is not None:
        render(value)
    else:
        fields(value)


def text(line: str = "", flush: bool = False) -> None:
    """One line of the result; `flush`: a reader of a pipe has it at once."""
    print(line, flush=flush)


def note(line: str) -> None:
    """One line beside the result, such as what is about to be done."""
    print(line, file=sys.stderr, flush=True)


def error_text(message: str) -> None:
    """Help for somebody who typed nothing, or similar; as it is."""
    print(message, file=sys.stderr)


def error(failure: PgcdpError, as_json: bool, lines: Sequence[str] = ()) -> None:
    """`error:`, `lines` to choose from and `hint:` on standard error, or the one error object on standard output."""
    if as_json:
        print(json.dumps(failure.as_json(), ensure_ascii=False), flush=True)
        return
    note(f"error: {failure.message}{':' if lines else ''}")
    for line in lines:
        note(f"  {line}")
    if failure.hint:
        note(f"hint: {failure.hint}")


def interrupted() -> None:
    """Said after the cleanup that followed Ctrl-C or SIGTERM."""
    note("interrupted")


# --- values and tables


def value_text(key: str, value: Any) -> str:
    """A value of the JSON contract for people; `key` tells its unit."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key.endswith("seconds"):
        return format_duration(value)
    if isinstance(value, int) and ("bytes" in key.split("_") or key in ("limit", "size")):
        return format_size(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{label(inner)} {value_text(inner, value[inner])}" for inner in value)
    if isinstance(value, list | tuple):
        return ", ".join(value_text(key, item) for item in value) or "-"
    return str(value)


def label(key: str) -> str:
    """ "last_write" as people write it."""
    return key.replace("_", " ")


def fields(value: Mapping[str, Any]) -> None:
    """Lines of name and value; a list of objects becomes a table under its name."""
    flat = {key: item for key, item in value.items() if not _is_rows(item)}
    pairs([(label(key), value_text(key, item)) for key, item in flat.items()])
    for item in value.values():
        if _is_rows(item):
            text()
            columns = list(item[0])
            table([label(column) for column in columns], [[value_text(c, row.get(c)) for c in columns] for row in item])


def _is_rows(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and isinstance(item[0], Mapping)


def pairs(items: Sequence[tuple[str, str]]) -> None:
    """Two columns without a head."""
    width = max((len(name) for name, _ in items), default=0)
    for name, value in items:
        text(f"{name:{width}}  {value}".rstrip())


def gap(value: Mapping[str, Any]) -> str:
    """A gap, as docs/json.md has it, in one line."""
    last, until = value["to_write"], value["to_time"]
    where = f"writes {value['from_write']} " + ("on, which goes on" if last is None else f"to {last}")
    when = f"from {value['from_time']} " + ("on" if until is None else f"to {until}")
    return f"GAP of {value['blocks']} blocks ({value['reason']}), {where}, {when}: no recovery point is there"


def one_line(statement: str) -> str:
    """SQL as one indented line of the terminal's width (elsewhere of LINE characters), without control characters."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else LINE
    words = " ".join("".join(char if char.isprintable() else " " for char in statement).split())
    shown = f"    {words}"
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], below: Mapping[int, str] | None = None) -> None:
    """A table: rich on a terminal, aligned columns elsewhere. Columns of numbers stand to the right.

    `below`: SQL to show in a line of its own below a row, by the row's number; all is aligned columns then.
    """
    if sys.stdout.isatty() and not below:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, pad_edge=False, header_style="bold")
        for column, is_right in zip(columns, _right(columns, rows), strict=True):
            drawn.add_column(column, justify="right" if is_right else "left")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console(highlight=False).print(drawn)
        return
    for number, line in enumerate(aligned(columns, rows), -1):
        text(line)
        if below and number in below:
            text(one_line(below[number]))


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its head first. Columns of numbers stand to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    sides = [">" if is_right else "<" for is_right in _right(columns, rows)]
    return ["  ".join(f"{c:{s}{w}}" for c, w, s in zip(row, widths, sides, strict=True)).rstrip()
            for row in [columns, *rows]]  # fmt: skip


def _right(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    return [bool(rows) and all(row[i][:1].isdigit() or row[i] == "-" for row in rows) for i in range(len(columns))]


# --- progress


@contextmanager
def progress(output: str) -> Iterator[Report]:
    """The report to hand to a use case: bars on a terminal, plain lines elsewhere, nothing with `--output json`."""
    if output == "json":
        yield silent
        return
    drawn = _Bars() if sys.stderr.isatty() else _Lines()
    try:
        yield drawn.report
    finally:
        drawn.close()


def amount(moment: Progress) -> str:
    """ "1.0 GiB of 4.0 GiB", "12 of 60 writes", or "" when nothing is counted."""
    if moment.done is None:
        return ""
    if moment.unit == "bytes":
        done, unit = format_size(moment.done), ""
        total = None if moment.total is None else format_size(moment.total)
    else:
        done, unit = str(moment.done), f" {moment.unit}" if moment.unit else ""
        total = None if moment.total is None else str(moment.total)
    return f"{done}{unit}" if total is None else f"{done} of {total}{unit}"


class _Lines:
    """A line when a step begins, now and then while it lasts, and when it has ended."""

    def __init__(self) -> None:
        self.step: str | None = None
        self.began = self.said = 0.0

    def report(self, moment: Progress) -> None:
        now = time.monotonic()
        if moment.failed:
            note(f"{moment.step}: failed after {format_duration(now - self.began)}")
            self.step = None
        elif moment.step != self.step:
            self._finish()
            self.step, self.began, self.said = moment.step, now, now
            note(f"{moment.step} ...")
        elif moment.done is not None and now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            note(f"{moment.step}: {amount(moment)}")

    def _finish(self) -> None:
        if self.step is not None:
            note(f"{self.step}: {format_duration(time.monotonic() - self.began)}")

    def close(self) -> None:
        """Say how long the last step took, unless it failed."""
        if sys.exc_info()[0] is None:
            self._finish()


class _Bars:
    """One bar for each step; those that are over stay above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Drawn

        self.drawn = Drawn(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True, highlight=False),
        )
        self.step: str | None = None
        self.drawn.start()

    def report(self, moment: Progress) -> None:
        if moment.step != self.step:
            self._finish()
            self.step = moment.step
            self.task = self.drawn.add_task(moment.step, total=moment.total, amount=amount(moment))
        self.drawn.update(self.task, completed=moment.done or 0, total=moment.total, amount=amount(moment))
        if moment.failed:
            self.drawn.update(self.task, description=f"✗ {moment.step}", amount="failed")
            self.drawn.stop_task(self.task)
            self.step = None

    def _finish(self) -> None:
        if self.step is None:
            return
        task = next(task for task in self.drawn.tasks if task.id == self.task)
        total = task.total if task.total else 1
        self.drawn.update(self.task, total=total, completed=total)

    def close(self) -> None:
        """Leave the bars as they are: a failed step must not look done."""
        if sys.exc_info()[0] is None:
            self._finish()
        self.drawn.stop()
