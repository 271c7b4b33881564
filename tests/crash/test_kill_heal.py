"""kill -9 of the command, the agent and the engine at random moments of healing: `up` finishes it, as one gap.

Nothing is mounted before it has ended; then image and volume are equal, and points before and behind the gap right.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest

from pgcdp import api, healing
from pgcdp.capture import attach, volumes
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres import cluster
from pgcdp.records import Target
from tests.cluster.test_changed_volumes import mounted_plain
from tests.crash.test_kill_rewind import START, kill_when, start_command
from tests.crash.test_kill_set import ALLOWED
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.results import keep_result

FOREIGN_BYTES = 24 << 20


def kill_round(found: ProtectedSet, chooser: random.Random, number: int) -> dict[str, Any]:
    """The volume is changed, and healing killed; what was left, for the record."""
    found.sql(f"insert into kept values ({number})")
    gaps = len(found.source().gaps())
    api.down(found.name)
    last = found.source().newest()
    (volume,) = found.config.volumes
    with mounted_plain(found, volume) as place:
        (place / "foreign").write_bytes(chooser.randbytes(FOREIGN_BYTES))
    victims = chooser.choice(
        [("command",), ("command", "agent"), ("command", "agent", "engine"), ("engine", "command")]
    )
    command = start_command(found, "up", found.name, "--heal", "--yes")
    if chooser.random() < 0.5:
        later = chooser.random() * chooser.choice([0.05, 0.5, 2.0])
        moment, reached = "healing begins", lambda: healing.pending(found.config.paths) is not None
    else:
        later = chooser.random() * 0.1
        moment, reached = "the gap begins", lambda: newest(found) > last
    kill_when(found, command, victims, reached, moment, later)
    left = healing.pending(found.config.paths) is not None
    begun = False
    if left:
        with pytest.raises(PreconditionError, match="was interrupted"):
            attach.up(found.config)
        assert volumes.mount_at(volume.mountpoint) is None
        assert cluster.find_postmaster(found.pgdata) is None
        begun = len(found.source().gaps()) > gaps
    found.up()
    found.wait_following()
    assert healing.pending(found.config.paths) is None
    known = found.source().gaps()
    assert len(known) == gaps + 1, "one gap, however often its healing began"
    gap = known[-1]
    assert gap.begin == last + 1
    assert gap.end is not None
    assert gap.blocks >= FOREIGN_BYTES // 4096
    assert found.sql("select max(n) from kept") == [(number,)]
    api.cut(found.name)
    for write in (last, gap.end):
        with found.running_at(Target("write", write)) as box, box.connect() as connection:
            assert connection.execute("select max(n) from kept").fetchone() == (number,)
    api.down(found.name)
    found.assert_volume_is_newest()
    found.up()
    found.wait_following()
    return {"killed": list(victims), "left": left, "begun": begun}


def newest(found: ProtectedSet) -> int:
    """The newest write that capture has; 0 while none runs."""
    with suppress(PgcdpError):
        return found.engine.status().durable_write
    return 0


def rounds(make_set: MakeSet, binaries_of: BindirOf, fs: str, count: int, seed: int) -> list[dict[str, Any]]:
    found = make_set(binaries_of(15), fs=fs, size=384 << 20, allowed=[*ALLOWED, r"the agent", START])
    found.sql("create table kept (n int)")
    api.cut(found.name)
    chooser = random.Random(seed)
    return [kill_round(found, chooser, number) for number in range(count)]


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_three_kills_of_healing(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    assert any(each["left"] for each in rounds(make_set, binaries_of, fs, 3, seed=21))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_twenty_kills_of_healing(make_set: MakeSet, binaries_of: BindirOf, fs: str) -> None:
    told = rounds(make_set, binaries_of, fs, 20, seed=22)
    keep_result(f"kill-heal-{fs}", told)
    assert any(each["begun"] for each in told)
