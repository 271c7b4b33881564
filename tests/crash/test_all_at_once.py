"""A holder, kills, foreign changes and another owner in one history: each refuses what is the other's to do, and what
was captured on all sides of it stays right. At the end image and volume are equal byte for byte."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from pgcdp import api, healing, rewinding
from pgcdp.capture import holder
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.records import Target
from tests.cluster.test_changed_volumes import mounted_plain
from tests.crash.test_held_capture import assert_clean, captures
from tests.crash.test_kill_rewind import START
from tests.crash.test_kill_set import ALLOWED
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until

SAID = [*ALLOWED, r"the agent", START, r"no capture process takes over", r"locked by another capture process"]


def skip_without_holder() -> None:
    if holder.missing() is not None:
        pytest.skip(f"no holder here: {holder.missing()}")


def wait_served(found: ProtectedSet, after: int) -> None:
    """Until a capture process behind that number serves."""

    def serves() -> bool:
        try:
            return captures(found) > after
        except PgcdpError:
            return False

    wait_until(serves, timeout=60, what="the next capture process")


@contextmanager
def killed_meanwhile(found: ProtectedSet, pauses: Iterator[float]) -> Iterator[list[int]]:
    """Capture is killed inside again and again, its holder never; gets how often."""
    ended, kills = threading.Event(), [0]

    def kill() -> None:
        while not ended.wait(next(pauses)):
            try:
                number = captures(found)
                found.kill_capture()
                kills[0] += 1
            except PgcdpError:  # between two connections, or the next one is on its way
                continue
            try:
                wait_served(found, number)
            except TimeoutError:  # the holder went too, as `down` wants it
                continue

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield kills
    finally:
        ended.set()
        thread.join()


def up(found: ProtectedSet) -> bool:
    try:
        found.up()
    except PgcdpError:  # capture was killed under it
        return False
    return rewinding.pending(found.config.paths) is None


def rewound(found: ProtectedSet, target: Target) -> bool:
    """Whether a rewind came through; where capture was just not there when it was asked, `up` finishes or puts back."""
    try:
        api.rewind(found.name, target, agree=lambda resolved: None, prove=False)
    except PgcdpError as error:
        print(f"helped after: {error.message}")
        wait_until(lambda: up(found), timeout=240, interval=0.2, what="up")
        return False
    return True


def test_a_holder_a_heal_and_another_owner_in_one_history(
    make_set: MakeSet, binaries_of: BindirOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refuses what is the other's to do, and what was captured on all sides of it stays right."""
    skip_without_holder()
    found = make_set(binaries_of(15), size=384 << 20, allowed=[*SAID, r"belongs to", r"the holder of main was gone"])
    found.sql("create table kept (n int primary key)")
    found.sql("insert into kept values (1)")
    api.cut(found.name)
    first, copy = found.root / "state", found.root / "copy"
    shutil.copytree(first / "etc", copy / "etc")

    # Alive, held: neither healing nor another owner may come near.
    number = captures(found)
    found.kill_agent()
    found.kill_capture()
    with pytest.raises(PreconditionError, match=r"is attached|was not stopped cleanly"):
        healing.heal(found.config, found.root, lambda found: None)
    monkeypatch.setenv("PGCDP_ROOT", str(copy))
    with pytest.raises(PgcdpError) as refused:
        found.up()
    assert "belongs to" in refused.value.message
    monkeypatch.setenv("PGCDP_ROOT", str(first))
    found.up()
    wait_served(found, number)
    found.sql("insert into kept values (2)")
    found.wait_following()

    # Changed while it was detached, taken in by the other owner, with capture killed on its way.
    api.down(found.name)
    before = found.source().newest()
    (volume,) = found.config.volumes
    with mounted_plain(found, volume) as place:
        (place / "foreign").write_bytes(random.Random(5).randbytes(24 << 20))
    monkeypatch.setenv("PGCDP_ROOT", str(copy))
    with pytest.raises(PreconditionError, match="belongs to"):
        api.up(found.name, heal=lambda found: None)
    with killed_meanwhile(found, iter(lambda: 0.3, None)) as kills:
        with suppress(PgcdpError):  # capture was just not there when it was asked for something: `up` goes on
            api.up(found.name, heal=lambda found: None, take_over=True)
        wait_until(lambda: up(found), timeout=120, interval=0.2, what="up")
        wait_until(lambda: kills[0] >= 2, timeout=60, what="kills")
    found.wait_following()
    (gap,) = found.source().gaps()
    assert (gap.begin, gap.reason) == (before + 1, "changed")
    assert found.sql("select n from kept order by n") == [(1,), (2,)]
    assert (found.pgdata / "foreign").stat().st_size == 24 << 20
    found.sql("insert into kept values (3)")
    boundary = api.cut(found.name)
    assert found.source().gaps() == [gap]

    # The first one is not the owner any more, whatever state it is in.
    monkeypatch.setenv("PGCDP_ROOT", str(first))
    with pytest.raises(PreconditionError, match=r"belongs to|is that of"):
        found.up()
    with pytest.raises(PreconditionError, match="is in use by"):
        api.up(found.name, take_over=True)
    monkeypatch.setenv("PGCDP_ROOT", str(copy))
    assert found.sql("select count(*) from kept") == [(3,)]
    for target, wanted in ((Target("write", before), 2), (Target("boundary", boundary["number"]), 3)):
        with found.running_at(target) as box, box.connect() as connection:
            assert connection.execute("select max(n) from kept").fetchone() == (wanted,)

    # Rewound over the gap and back, held and killed.
    with killed_meanwhile(found, iter(lambda: 1.5, None)):
        wait_until(lambda: rewound(found, Target("write", before)), timeout=240, what="a rewind")
    assert found.sql("select n from kept order by n") == [(1,), (2,)]
    assert not (found.pgdata / "foreign").exists()
    found.wait_following()  # a rewind refuses while the agent waits for the next capture process
    api.rewind(found.name, Target("boundary", boundary["number"]), agree=lambda resolved: None)
    assert found.sql("select max(n) from kept") == [(3,)]
    assert (found.pgdata / "foreign").stat().st_size == 24 << 20
    found.amcheck()
    api.down(found.name)
    found.assert_volume_is_newest()
    assert_clean(found)
    assert found.complaints() == []  # of the second owner; those of the first are looked at behind each test
