"""One bit of a file is another one for a while: damage that a test can take back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flipped(file: Path, offset: int, bit: int) -> Iterator[None]:
    """One bit of a file is another inside."""
    with file.open("r+b", buffering=0) as handle:
        before = os.pread(handle.fileno(), 1, offset)
        os.pwrite(handle.fileno(), bytes([before[0] ^ (1 << bit)]), offset)
        try:
            yield
        finally:
            os.pwrite(handle.fileno(), before, offset)
