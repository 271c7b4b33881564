"""What a soak run found, for `bench/results/`: written where `PGCDP_RESULTS` says, when it says so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def keep_result(name: str, found: Any) -> None:
    """`found` as `name`.json in the directory of `PGCDP_RESULTS`, which is made."""
    directory = os.environ.get("PGCDP_RESULTS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
