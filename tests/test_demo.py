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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.namespaces import LET_GO
from tests.scratch import keep_apart
from tests.waiting import wait_until

PROGRAM = [str(Path(sys.executable).with_name("pgcdp"))]
"""Not `python -m pgcdp`, where Python itself dies of a Ctrl-C that came in an exec() of an import, handled as it is."""
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
        inside = f'{LET_GO}; {seen}mount --rbind "$0" /var/tmp && cd / && {script}'
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
        backing = []
        for file in Path("/sys/block").glob("loop*/loop/backing_file"):
            with suppress(OSError):  # it was detached meanwhile, by whoever had it
                backing.append(file.read_text())
        return [file for file in backing if "pgcdp-demo-" in file and self.place.name in file]


@pytest.fixture
def private_tmp() -> Iterator[PrivateTmp]:
    place = Path(tempfile.mkdtemp(prefix="pgcdp-private-", dir="/var/tmp"))
    place.chmod(0o1777)
    keep_apart(place)
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


def lay_in_the_way(place: Path) -> None:
    """A file where the demo restores to."""
    (place / "restored").write_text("in the way")


def process_of(place: Path, word: bytes) -> int:
    """The demo's process whose command line has the word; one that it is just starting has the same until its exec."""

    def only() -> int | None:
        pids = []
        for pid in running_below(place):
            with suppress(OSError):  # it has ended meanwhile
                if word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    pids.append(pid)
        return pids[0] if len(pids) == 1 else None

    pid = wait_until(only, what=f"one process of the demo that is its {word.decode()}")
    assert pid is not None
    return pid


def signalled(word: bytes, number: int) -> Callable[[Path], None]:
    """Send a signal to such a process."""
    return lambda place: os.kill(process_of(place, word), number)


def cut_off(place: Path) -> None:
    """Kill capture with its holder, which would keep the volumes for the next one: at once, else each is replaced."""
    for pid in [process_of(place, word) for word in (b"hold", b"capture")]:
        os.kill(pid, signal.SIGKILL)


FAILURES: dict[str, tuple[dict[str, Callable[[Path], None]], str]] = {
    "while the agent hangs": (
        # A step before the one that fails, behind which the demo ends the agent: that may be quicker than this test.
        {"load:": lay_in_the_way, "verifying exactly behind": signalled(b"agent", signal.SIGSTOP)},
        "restoring to just before it",
    ),
    "the agent is gone": ({"load:": signalled(b"agent", signal.SIGKILL)}, "checkpoint, cutting the interval"),
    "capture is gone": ({"load:": cut_off}, ""),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_a_failed_step_is_told_and_nothing_runs_on(private_tmp: PrivateTmp, what: str) -> None:
    """All is ended, whatever state it is in, and the logs can be read."""
    process = private_tmp.start('exec "$@" demo')
    assert process.stderr is not None
    actions, failing = FAILURES[what]
    left = dict(actions)
    seen = []
    while left and (line := process.stderr.readline()):
        seen.append(line)
        for moment in [moment for moment in left if line.startswith(moment)]:
            (place,) = private_tmp.place.glob("pgcdp-demo-*")
            process.send_signal(signal.SIGSTOP)  # else it is steps ahead by the time that its agent is found
            try:
                left.pop(moment)(place)
            finally:
                process.send_signal(signal.SIGCONT)
    told, rest = process.communicate(timeout=400)
    text = "".join(seen) + rest
    assert process.returncode not in (0, 130), text
    failed = [line for line in text.splitlines() if ": failed after " in line]
    assert len(failed) == 1, text
    step = failed[0].partition(": failed after ")[0]
    assert step.startswith(failing), text
    assert f"{step}: " not in text.replace(failed[0], ""), "a failed step must not look done"
    seen_as = Path("/var/tmp") / place.name
    assert f"all files and logs are kept in {seen_as}, to be removed with: rm -r {seen_as}" in rest
    assert (place / "root/var/lib/pgcdp/demo/agent.log").exists()
    assert running_below(place) == []
    wait_until(lambda: not private_tmp.loops(), what="end of the demo's loop devices")
    assert told == ""
    shutil.rmtree(place)
    private_tmp.assert_empty()


def running_below(place: Path) -> list[int]:
    """Processes that name the demo's directory, in their command line or their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if place.name.encode() in words:
                found.append(int(process.name))
    return found


def test_kept_demo_can_be_looked_at_and_removed(private_tmp: PrivateTmp) -> None:
    """What `next` and `remove` say is run as it is printed; by a root whose files are his alone."""
    script = """
        umask 077
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
