"""What a sandbox makes of the log of crash recovery."""

from __future__ import annotations

from pgcdp.recovery.sandbox import read_recovery


def test_only_the_warnings_of_a_repeated_drop_are_passed_over() -> None:
    log = """
2026-11-25 [7] WARNING:  could not open directory "base/5": No such file or directory
2026-11-25 [7] WARNING:  some useless files may be left behind in old database directory "base/5"
2026-11-25 [7] WARNING:  could not open directory "base/6": Permission denied
2026-11-25 [7] WARNING:  some useless files may be left behind in old database directory "base/6"
"""
    warnings = read_recovery(log, 0.1).warnings
    assert len(warnings) == 2
    assert all("base/6" in line for line in warnings)
