"""on_full = track: where no gap may begin, and what a successor of the capture process knows of that."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_tracking import (
    SMALL,
    Keeper,
    assert_volumes_equal_writes,
    assert_writes_wait,
    fill,
    heal,
    load,
    state,
)
from tests.fix_engine import MIB, Capture, Direct, MakeCapture
from tests.waiting import wait_until


def test_no_gap_begins_inside_a_rewind(make_capture: MakeCapture) -> None:
    """Its end record needs the journal, and Postgres does not run: writes wait."""
    capture = make_capture({"data": 8 * MIB}, **SMALL)
    capture.start()
    capture.wait_ready()
    keeper = Keeper(capture)
    assert "write" in capture.request("mark", name="1", rewind="begin")
    assert_writes_wait(capture, keeper, 1)
    assert "write" in capture.request("mark", name="1", rewind="end")
    assert capture.stop() == 0


def restart(capture: Capture, how: str) -> None:
    """The capture process ends, and the next one begins."""
    if how == "synced, killed":  # the begin record is in front of the applied mark
        assert "error" not in capture.request("sync")
    if how == "stopped":
        assert capture.stop() == 0
    else:
        capture.kill()
    capture.start()


@pytest.mark.parametrize(
    ("what", "name", "how"),
    [
        ("rewind", "1", "killed"),
        ("rewind", "1", "synced, killed"),
        ("rewind", "1", "stopped"),
        ("gap", "changed 5", "synced, killed"),
    ],
)
def test_a_successor_knows_that_it_is_inside(make_capture: MakeCapture, what: str, name: str, how: str) -> None:
    """Postgres does not run between the records of a rewind or of `up --heal`; their end record needs the journal."""
    record: dict[str, Any] = {"name": name, what: "begin"}
    capture = make_capture({"data": 8 * MIB}, **SMALL)
    capture.start()
    capture.wait_ready()
    keeper = Keeper(capture)
    assert "write" in capture.request("mark", **record)
    restart(capture, how)
    restart(capture, "killed")
    assert_writes_wait(capture, keeper, 1)
    assert "write" in capture.request("mark", **(record | {what: "end"}))
    restart(capture, how)
    keeper.take()
    with load(capture, 2) as work:
        fill(capture, work)
    keeper.take()
    heal(capture, keeper)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)


def test_a_successor_in_the_gap_itself_goes_back_to_tracking(make_capture: MakeCapture) -> None:
    """The begin record of the gap is no reason to let writes wait when the journal is full again."""
    capture = make_capture({"data": 128 * MIB}, **SMALL)
    capture.start()
    keeper = Keeper(capture)
    with load(capture, 1) as work:
        fill(capture, work)
    with Direct(capture.device("data")) as volume:
        for at in range(0, 128 * MIB, MIB):
            volume.write(at, at.to_bytes(8, "little") * (MIB // 8))
    keeper.take()
    for _ in range(2):  # the second one in what the successor has begun again
        wait_until(lambda: "error" not in capture.request("heal"), what="room")
        wait_until(lambda: capture.status()["tracked"]["healing"], what="healing")  # which has no room for all of it
        capture.kill()
        capture.start()
        keeper.take_some()  # it heals again by itself
    wait_until(lambda: "error" not in capture.request("heal"), what="room")
    with load(capture, 2) as work:
        wait_until(
            lambda: state(capture) == "tracking" and not capture.status()["tracked"]["healing"],
            timeout=120,
            what="tracking again",
        )
        work.wait_answered(work.answered + 300)
    heal(capture, keeper)
    assert capture.stop() == 0
    assert_volumes_equal_writes(capture, keeper)
