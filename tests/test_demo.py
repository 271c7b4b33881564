"""`pgcdp demo` as users run it: it proves its restores, and leaves nothing behind, also when it is interrupted.

Each run sees a /var/tmp of its own (a mount namespace), so that what is left there is its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until

PROGRAM = [sys.executable, "-P", "-m", "pgcdp"]
pytestmark = pytest.mark.timeout(600)


class PrivateTmp:
    """A place that a program sees as /var/tmp."""

    def __init__(self, place: Path) -> None:
        self.place = place
        # The program itself may be installed below the real one, and must be seen inside too.
        program = Path(sys.prefix)
        self.seen = [Path(*program.parts[:4])] if program.is_relative_to("/var/tmp") else []
        for directory in self.seen:
            (place / directory.name).mkdir()

    def start(self, script: str) -> subprocess.Popen[str]:
        """A shell script in the namespace; `$@` is the program `pgcdp`."""
        seen = "".join(f'mount --bind {directory} "$0/{directory.name}" && ' for directory in self.seen)
        inside = f'{seen}mount --rbind "$0" /var/tmp && cd / && {script}'
        return subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", inside, str(self.place), *PROGRAM],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def assert_empty(self) -> None:
        """No file is left, and no loop device over one; the last one goes when the kernel lets go of it."""
        assert [file.name for file in self.place.iterdir()] == [directory.name for directory in self.seen]
        wait_until(lambda: not self.loops(), what="end of the demo's loop devices")

    def loops(self) -> list[str]:
        backing = [file.read_text() for file in Path("/sys/block").glob("loop*/loop/backing_file")]
        return [file for file in backing if "pgcdp-demo-" in file and self.place.name in file]


@pytest.fixture
def private_tmp() -> Iterator[PrivateTmp]:
    place = Path(tempfile.mkdtemp(prefix="pgcdp-private-", dir="/var/tmp"))
    place.chmod(0o1777)
    yield PrivateTmp(place)
    shutil.rmtree(place)


def test_demo_proves_its_restores_and_leaves_nothing(private_tmp: PrivateTmp) -> None:
    process = private_tmp.start('exec "$@" demo --output json')
    told, said = process.communicate(timeout=500)
    assert process.returncode == 0, f"{told}\n{said}"
    assert said == ""
    value = json.loads(told)
    assert value["ok"] is True
    assert [(restore["ok"], restore["paid_orders"]) for restore in value["restores"]] == [
        (True, 1000),
        (True, 1000),
        (True, 0),
        (True, 1000),
        (True, 1000),
        (True, 1000),
        (True, 0),
        (True, 1000),
        (True, 1000),
    ]
    assert value["captured"]["writes"] > 1000
    assert value["captured"]["intervals"] >= 2
    private_tmp.assert_empty()


@pytest.mark.parametrize(
    "step",
    ["making a cluster", "protecting it", "load:", "verifying exactly", "one commit onward", "rewinding production"],
)
def test_interrupted_demo_leaves_nothing(private_tmp: PrivateTmp, step: str) -> None:
    process = private_tmp.start('exec "$@" demo')
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith(step):
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130, "".join(seen) + rest
    assert rest.splitlines()[-1] == "interrupted"
    private_tmp.assert_empty()


def test_kept_demo_can_be_looked_at_and_removed(private_tmp: PrivateTmp) -> None:
    """What `next` and `remove` say is run as it is printed."""
    script = """
        json=$("$@" demo --keep --output json) || exit 1
        take() { printf %s "$json" | "$PYTHON" -c "import json, sys; print(json.load(sys.stdin)$1)"; }
        pgcdp() { "$PYTHON" -P -m pgcdp "$@"; }
        eval "$(take "['next'][0]")" && eval "$(take "['next'][2]")" && eval "$(take "['remove']")"
    """
    os.environ["PYTHON"] = sys.executable
    process = private_tmp.start(f"{{ {script}\n}}")
    told, said = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert "capturing" in told
    private_tmp.assert_empty()
