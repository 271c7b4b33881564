"""A mount or a loop file of anybody on this machine may have any bytes in its name: nobody's work ends by that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgcdp.capture import disks, volumes
from tests.namespaces import LET_GO
from tests.waiting import wait_until

NAME = os.fsdecode(b"caf\xe9 \n\r\x0c\xc2\x85\xe2\x80\xa8 - end")
"""No UTF-8; a newline, which the kernel escapes, and what Python takes for one; what divides a line of mountinfo."""
CHILD = """
import sys
from pathlib import Path
from pgcdp import log
from pgcdp.capture import volumes
place, file = map(Path, sys.argv[1:])
found = volumes.mount_at(place)
log.start(file)
log.get("pgcdp.test").warning("%s is a %s", place, found and found.fstype)
sys.stdin.read()
"""


def test_of_a_mount(tmp_path: Path) -> None:
    place, log = tmp_path / NAME, tmp_path / "log"
    place.mkdir()
    inside = f'{LET_GO}; mount -t tmpfs none "$1" && exec "$0" -c "$CHILD" "$1" "$2"'
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        inside,
        sys.executable,
        str(place),
        str(log),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "CHILD": CHILD}) as process:
        wait_until(lambda: log.exists() or process.poll() is not None, what="its look")
        assert volumes.mounted_by(Path("/dev/null")) == [], "who looks at the mounts of all processes"
        process.communicate()
    assert process.returncode == 0
    assert log.read_text("utf-8").endswith("\\udce9 \n\r\x0c\x85\u2028 - end is a tmpfs\n".replace("\r", "\n"))


@pytest.mark.parametrize("deleted", [b"", b" (deleted)"])
def test_of_the_file_of_a_loop_device(tmp_path: Path, deleted: bytes) -> None:
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/backing_file").write_bytes(os.fsencode(f"/x/{NAME}") + deleted + b"\n")
    assert volumes.backing_file(tmp_path) == Path(f"/x/{NAME}" + deleted.decode())
    assert disks._backing_file(tmp_path) == f"/x/{NAME}"
