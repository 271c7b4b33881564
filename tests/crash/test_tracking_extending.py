"""on_full = track, and `protect --tablespace` meets a gap: production comes back without the new volume, and heals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from pgcdp import api
from pgcdp.capture import volumes
from pgcdp.capture.planning import Backing
from pgcdp.config import save_config
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.progress import Progress
from tests.cluster.test_extending import WHILE_DOWN, rows
from tests.cluster.test_outside import new_space
from tests.crash.test_tracking_set import SAID, until_healed
from tests.faults.service import Faults
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until

MIB = 1 << 20


@pytest.fixture
def tracking(
    faults: Faults, faulty_engine: Path, make_set: MakeSet, binaries_of: BindirOf, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ProtectedSet, Path]]:
    """A set with `on_full = track`, and where a tablespace lies that was made since."""
    found = make_set(binaries_of(15), protect=False, allowed=[*SAID, *WHILE_DOWN, "is sealed at", "Input/output error"])
    monkeypatch.setenv("PGCDP_ENGINE", str(faulty_engine))
    found.protect(size=384 * MIB, settings={}, journal_limit=512 * MIB)
    place = new_space(found, "late")[0]
    found.sql("create table more tablespace late as select repeat('x', 1000) from generate_series(1, 20000)")
    api.down(found.name)
    save_config(replace(found.config, on_full="track", segment_size=8 * MIB))
    found.up()
    found.wait_following()
    yield found, place
    faults.clear_all()


RUNNER = """
import os, signal, time
from pgcdp import api
from pgcdp.capture.planning import Backing

def report(progress):
    if progress.step == "copying the tablespace" and progress.done:
        print("copying", flush=True)
        while api.status("main")["state"] != "tracking":
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

api.add_tablespaces("main", [("late", Backing(None, 96 << 20))], yes=True, progress=report)
"""


def test_a_gap_while_the_tablespace_is_copied(tracking: tuple[ProtectedSet, Path], faults: Faults) -> None:
    """The last writes of the copy are in no interval: it is put back, though what is tracked is of one volume more."""
    found, place = tracking

    def report(progress: Progress) -> None:
        if progress.step == "copying the tablespace":
            faults.set("journal.batch.sync", "eio", times=0)

    with pytest.raises(PgcdpError):
        api.add_tablespaces(found.name, [("late", Backing(None, 96 * MIB))], yes=True, progress=report)
    assert_as_before(found, place, faults)


@pytest.mark.parametrize("capture_dies", [False, True])
def test_killed_in_a_gap_while_the_tablespace_is_copied(
    tracking: tuple[ProtectedSet, Path], faults: Faults, capture_dies: bool
) -> None:
    """And its capture process with it."""
    found, place = tracking
    with subprocess.Popen([sys.executable, "-c", RUNNER], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "copying\n"
        faults.set("journal.batch.sync", "eio", times=0)
        assert command.wait(300) == -signal.SIGKILL
    if capture_dies:
        found.kill_engine()
    found.up()
    assert_as_before(found, place, faults)


def cut(found: ProtectedSet) -> bool:
    with suppress(PreconditionError):
        return bool(api.cut(found.name)["number"])
    return False


def assert_as_before(found: ProtectedSet, place: Path, faults: Faults) -> None:
    assert rows(found) == 1000
    assert volumes.mount_at(place) is None
    assert [volume.name for volume in found.config.volumes] == ["data"]
    faults.clear_all()
    until_healed(found)
    found.wait_following()
    wait_until(lambda: cut(found), what="a boundary")  # the agent has seen the gap half a second ago, perhaps
    api.down(found.name)
    found.assert_volume_is_newest()
    found.up()
