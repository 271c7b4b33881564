"""Takes one sync out of an agent, for the power cuts that must notice: its directory stands on PYTHONPATH.

`PGCDP_TEST_WITHOUT_SYNC` is MODULE:FUNCTION, such as pgcdp.store.frames:fsync: `os.FUNCTION` does nothing when that
module calls it.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


class _WithoutSync:
    """The module `os`, but for one function."""

    def __init__(self, function: str) -> None:
        self._function = function

    def __getattr__(self, name: str) -> Any:
        return (lambda file: None) if name == self._function else getattr(os, name)


if "agent" in sys.orig_argv:
    module, _, function = os.environ["PGCDP_TEST_WITHOUT_SYNC"].partition(":")
    vars(importlib.import_module(module))["os"] = _WithoutSync(function)
