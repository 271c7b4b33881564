"""Sizes, durations, times and LSNs, in and out. Everything inside pgcdp is bytes, seconds and nanoseconds."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from pgcdp.errors import UsageError

_SIZE_STEPS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DURATION_STEPS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes of "20G", "512M", "4096" (powers of 1024, optional B or iB). Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f'"{text}" is not a size', "sizes look like 512M, 20G or 1T")
    return int(float(match[1]) * _SIZE_STEPS[match[2].upper()])


def format_size(count: int) -> str:
    """A size for people: "1.5 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def exact_size(count: int) -> str:
    """A size that `parse_size` reads back to the same number: "16G", "20481M", "4096"."""
    for suffix, step in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count and count % step == 0:
            return f"{count // step}{suffix}"
    return str(count)


def parse_duration(text: str) -> float:
    """Seconds of "5min", "30s", "1h", "500ms". Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|d)", text.strip())
    if match is None:
        raise UsageError(f'"{text}" is not a duration', "durations look like 30s, 5min or 1h, as in postgresql.conf")
    return float(match[1]) * _DURATION_STEPS[match[2]]


def format_duration(seconds: float) -> str:
    """A duration for people: "0.8 s", "4 min 10 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def exact_duration(seconds: float) -> str:
    """A duration that `parse_duration` reads back to the same number."""
    return f"{int(seconds) if seconds == int(seconds) else seconds}s"


def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC with microseconds, from ns since 1970."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_ns // 1000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%f") + "Z"


def parse_time(text: str) -> int:
    """Nanoseconds since 1970 of an ISO time; without a zone it is local time, as in psql. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(
            f'"{text}" is not a time', "times look like 2026-11-22 14:03:00 or 2026-11-22T14:03:00.5+01:00"
        ) from None
    if moment.tzinfo is None:
        moment = moment.astimezone()
    span = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (span.days * 86400 + span.seconds) * 10**9 + span.microseconds * 1000


def parse_lsn(text: str) -> int:
    """The 64-bit position of "0/176CE10". Raises UsageError."""
    match = re.fullmatch(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})", text.strip())
    if match is None:
        raise UsageError(f'"{text}" is not an LSN', "LSNs look like 0/176CE10")
    return (int(match[1], 16) << 32) | int(match[2], 16)


def format_lsn(lsn: int) -> str:
    """ "0/176CE10" of a 64-bit position."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
