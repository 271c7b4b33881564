"""A holder, kills, foreign changes and another owner in one history; and kills of capture while production is rewound,
cut and expired. Postgres is real, and at the end image and volume are equal byte for byte."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from pgcdp import api, healing, rewinding
from pgcdp.capture import holder
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.records import Target
from tests.cluster.test_changed_volumes import mounted_plain
from tests.cluster.test_expire import set_policy
from tests.crash.test_held_capture import assert_clean, captures
from tests.crash.test_kill_rewind import LOOK, START
from tests.crash.test_kill_set import ALLOWED
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.results import keep_result
from tests.waiting import wait_until

SAID = [*ALLOWED, r"the agent", LOOK, START, r"no capture process takes over", r"locked by another capture process"]


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
    api.rewind(found.name, Target("boundary", boundary["number"]), agree=lambda resolved: None)
    assert found.sql("select max(n) from kept") == [(3,)]
    assert (found.pgdata / "foreign").stat().st_size == 24 << 20
    found.amcheck()
    api.down(found.name)
    found.assert_volume_is_newest()
    assert_clean(found)
    found.up()
    found.wait_following()


GOALS = (1000, 2000)


def make_goals(found: ProtectedSet) -> dict[int, Target]:
    """Kept marks, by how many rows there are at each: retention never lets go of those points."""
    found.sql("create table ledger (n int primary key, filler text)")
    made = {}
    for goal in GOALS:
        found.sql(f"insert into ledger select n, repeat('x', 1000) from generate_series({goal - 999}, {goal}) n")
        api.mark(found.name, f"rows-{goal}", keep=True)
        made[goal] = Target("name", name=f"rows-{goal}")
        for _ in range(3):
            found.sql("update ledger set filler = reverse(filler) where n % 7 = 0")
            api.cut(found.name)
    return made


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


@contextmanager
def cut_and_expired(found: ProtectedSet) -> Iterator[dict[str, int]]:
    """Inside, cuts and runs of retention go on; gets how many came through, and what went."""
    ended, told = threading.Event(), {"cuts": 0, "runs": 0, "joined": 0, "thinned": 0}

    def work() -> None:
        while not ended.wait(0.1):
            with suppress(PgcdpError):
                api.cut(found.name)
                told["cuts"] += 1
            with suppress(PgcdpError):
                done = api.expire(found.name)
                told["runs"] += 1
                told["joined"] += len(done["joined"])
                told["thinned"] += len(done["thinned"])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        thread.join()


def rounds(found: ProtectedSet, kills: int, seed: int) -> dict[str, Any]:
    """Rewinds to and fro with cuts, retention and kills of capture all the while, until there were so many kills."""
    chooser = random.Random(seed)
    targets = make_goals(found)
    set_policy(found, keep_writes="1s", keep_boundaries="1s", keep_hourly="1s", keep_daily="1s")
    seen = {"rewinds": 0, "helped": 0}
    with cut_and_expired(found) as told, killed_meanwhile(found, iter(lambda: chooser.random() * 2, None)) as killed:
        while killed[0] < kills:
            goal = GOALS[(seen["rewinds"] + seen["helped"]) % 2]
            seen["rewinds" if rewound(found, targets[goal]) else "helped"] += 1
            assert ledger(found) in GOALS
    return {"kills": killed[0], **seen, **told}


def ledger(found: ProtectedSet) -> int:
    """Rows, all of them whole."""
    ((count, total),) = found.sql("select count(*), sum(length(filler)) from ledger")
    assert total == 1000 * count
    return int(count)


def prove(make_set: MakeSet, binaries_of: BindirOf, fs: str, kills: int, seed: int) -> dict[str, Any]:
    skip_without_holder()
    found = make_set(binaries_of(15), fs=fs, size=384 << 20, allowed=SAID)
    told = rounds(found, kills, seed)
    print(told)
    found.up()
    found.wait_following()
    assert found.status()["state"] == "capturing"
    found.amcheck()
    api.cut(found.name)
    for goal in GOALS:
        with found.running_at(found.source().resolve(Target("name", name=f"rows-{goal}"))) as box, box.connect() as sql:
            assert sql.execute("select count(*) from ledger").fetchone() == (goal,)
    check = [each for each in api.check(found.name, True)["checks"] if not each["ok"]]
    assert not check, check
    api.down(found.name)
    assert holder.find(found.config.paths) is None
    found.assert_volume_is_newest()
    assert_clean(found)
    found.up()
    return told


@pytest.mark.timeout(900)
def test_capture_killed_while_production_is_rewound_cut_and_expired(make_set: MakeSet, binaries_of: BindirOf) -> None:
    told = prove(make_set, binaries_of, "ext4", 12, seed=31)
    assert told["rewinds"] >= 1, told
    assert told["thinned"] + told["joined"] >= 1, told


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fs", ["ext4", "xfs"])
def test_forty_kills_while_production_is_rewound_cut_and_expired(
    make_set: MakeSet, binaries_of: BindirOf, fs: str
) -> None:
    told = prove(make_set, binaries_of, fs, 40, seed=32)
    keep_result(f"all-at-once-{fs}", told)
    assert told["rewinds"] >= 5, told
