"""What keeps the agent from its work: whose disk it was decides whether what was taken may be synced once more."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pgcdp.capture.journal import LostWritesError
from pgcdp.config import Config
from pgcdp.errors import DamageError, PgcdpError
from pgcdp.serving.telling import of_the_journal, problem

CONFIG = cast(Config, SimpleNamespace(name="main", journal=Path("/j/main")))


def failed(file: str | None, number: int = errno.EIO) -> OSError:
    return OSError(number, os.strerror(number), file)


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (LostWritesError("writes 5 to 9 are lost", "up to 4"), True),
        (failed("/j/main/0000000000000001.seg"), True),
        (failed("/s/incoming/0000000001/writes"), False),
        (failed("/j/main-2/0000000000000001.seg"), False),
        (failed(None), False),
        (DamageError("/s/image/data.img has a damaged block 3 at offset 12288"), False),
    ],
)
def test_only_after_an_error_of_the_journal_the_store_may_be_synced(error: PgcdpError | OSError, so: bool) -> None:
    """A sync that failed is told of once: the next one would say that what is lost is there, and release it."""
    assert of_the_journal(CONFIG, error) == so


def test_what_is_to_be_done_is_named() -> None:
    for error in (LostWritesError("writes 5 to 9 are lost", "up to 4"), failed("/j/main/1.seg")):
        assert "pgcdp down main, then pgcdp up main --heal" in str(problem(CONFIG, error)[1])
    for error in (failed("/s/incoming/1/writes"), failed("/s/x", errno.ENOSPC), failed("/j/main/1.seg", errno.ENOSPC)):
        assert "--heal" not in str(problem(CONFIG, error)[1])
