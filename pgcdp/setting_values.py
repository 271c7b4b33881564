"""Reading and writing the value of one setting: what reads raises ValueError when the value does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgcdp.errors import UsageError
from pgcdp.metrics_address import parse_address
from pgcdp.units import exact_duration, parse_duration, parse_size


def exact_period(seconds: float | None) -> str:
    """As `exact_duration`, whole days as days; None is "all"."""
    if seconds is None:
        return "all"
    return f"{int(seconds) // 86400}d" if seconds and seconds % 86400 == 0 else exact_duration(seconds)


def exact_often(seconds: float | None) -> str:
    """As `exact_period`; None is "never"."""
    return "never" if seconds is None else exact_period(seconds)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def path(value: Any) -> Path:
    path = Path(text(value))
    if not path.is_absolute():
        raise ValueError
    return path


def optional_path(value: Any) -> Path | None:
    """None for an empty text."""
    return None if value == "" else path(value)


def path_or_nothing(value: Path | None) -> str:
    """As `optional_path` reads it."""
    return "" if value is None else str(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError
    return tuple(text(word) for word in value)


def command_line(value: Any) -> tuple[str, ...]:
    line = words(value)
    if not line or not line[0].startswith("/"):
        raise ValueError
    return line


def number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return read


def size(least: int, multiple: int = 4096) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        count = value if isinstance(value, int) and not isinstance(value, bool) else _parsed_size(text(value))
        if count < least or count % multiple:
            raise ValueError
        return count

    return read


def duration(value: Any) -> float:
    try:
        seconds = parse_duration(text(value))
    except UsageError:
        raise ValueError from None
    if seconds < 1:
        raise ValueError
    return seconds


def period(value: Any) -> float | None:
    """Seconds, None for "all"."""
    if value == "all":
        return None
    try:
        return parse_duration(text(value))
    except UsageError:
        raise ValueError from None


def often(value: Any) -> float | None:
    """Seconds, None for "never"."""
    return None if value == "never" else duration(value)


def _parsed_size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError:
        raise ValueError from None


def choice(*words: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return read


def matching(pattern: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not re.fullmatch(pattern, text(value)):
            raise ValueError
        return str(value)

    return read


def address(value: Any) -> str:
    parse_address(text(value))
    return str(value)


def cut(value: Any) -> tuple[str, ...]:
    rules = words([value] if isinstance(value, str) else value)
    for rule in rules:
        if rule in ("checkpoint", "rate") or rule.startswith("rate:"):
            continue
        try:
            parse_duration(rule)
        except UsageError:
            _parsed_size(rule)
    if not rules:
        raise ValueError
    return rules
