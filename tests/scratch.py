"""Where tests make their directories: one place on a disk, which user postgres can enter (not those of pytest).

ext4 does not give an inode out again for minutes, and looks at all those that it passes over each time a file is made.
A test makes and removes thousands in a few seconds: in one group of inodes, to copy a new cluster took 0.7 s instead of
0.06. So what is made here is spread over the disk, as ext4 does it with directories that are the top of something.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

SCRATCH = Path("/var/tmp/pgcdp-tests")


def keep_apart(place: Path) -> None:
    """Directories that are made in `place` have nothing to do with each other."""
    subprocess.run(["chattr", "+T", str(place)], capture_output=True, check=False)  # other filesystems have no need


def scratch_directory(kind: str, below: Path = SCRATCH) -> Path:
    """A new directory that any user can enter; the caller removes it."""
    if not SCRATCH.exists():
        SCRATCH.mkdir(mode=0o755, exist_ok=True)
        keep_apart(SCRATCH)
    made = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=below))
    made.chmod(0o755)
    return made
