"""The store of a set as the looks of one `pgcdp check` share it: why it does not open is found out once, and told once.

A key command that fails, or takes its minute, is then not run by each of them.
"""

from __future__ import annotations

from pathlib import Path

from pgcdp.errors import PgcdpError
from pgcdp.store.layout import Store


class Opened:
    """Of one check; another one tries again."""

    def __init__(self, path: Path, set_id: bytes) -> None:
        self._path, self._set_id = path, set_id
        self._failure: PgcdpError | OSError | None = None

    def store(self) -> Store:
        """The store as it is now, for the look that tells of it. Raises as `Store.open`, the same from then on."""
        if self._failure is not None:
            raise self._failure
        try:
            return Store.open(self._path, self._set_id)
        except (PgcdpError, OSError) as error:
            self._failure = error
            raise

    def if_it_opens(self) -> Store | None:
        """For the others; None where the look at the store tells why not."""
        try:
            return self.store()
        except (PgcdpError, OSError):
            return None
