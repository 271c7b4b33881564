"""The journal's files are removed or damaged: that is said with what to do, production runs on, and the set heals."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api, service
from pgcdp.capture import volumes
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.healing import Differences
from pgcdp.records import Target
from tests.fix_postgres import BindirOf
from tests.fix_sets import KILLED, MakeSet, ProtectedSet
from tests.waiting import wait_until

LOST = [
    r"journal.*(are lost|is missing|No such file|no such file)", r"cannot (free|make|use) a segment", r"the agent",
    r"journal .* begins anew", r"closing the store", r"no boundary was stored", r"has no segments", r"error:",
]  # fmt: skip


def rows(found: ProtectedSet) -> int:
    return int(found.sql("select count(*) from kept")[0][0])


def a_set(make_set: MakeSet, binaries_of: BindirOf, fs: str = "ext4") -> ProtectedSet:
    found = make_set(binaries_of(15), fs=fs, size=384 << 20, allowed=[*KILLED, *LOST])
    found.sql("create table kept (n int)")
    found.sql("insert into kept select generate_series(1, 100)")
    api.cut(found.name)
    found.sql("insert into kept values (101)")
    found.wait_following()
    return found


def segments(found: ProtectedSet) -> list[Path]:
    return sorted(found.config.journal.glob("*.seg"))


def all_taken(found: ProtectedSet) -> int:
    """The newest write, once the agent has taken it from the journal."""
    last = found.durable()
    wait_until(lambda: service.ask(found.config.paths, "status")["taken_write"] >= last, what="the agent takes it")
    return last


def batch_behind(found: ProtectedSet, write: int) -> tuple[Path, int]:
    """The segment and the offset of the batch that begins behind a write (FORMAT.md 1.2)."""
    for file in segments(found):
        raw = file.read_bytes()
        for place in re.finditer(b"PGCDPBAT", raw):
            if place.start() % 4096 == 0 and int.from_bytes(raw[place.start() + 24 :][:8], "little") == write + 1:
                return file, place.start()
    raise AssertionError(f"no batch begins with write {write + 1}")


def cut_within(found: ProtectedSet, seconds: float) -> PgcdpError | None:
    """What a cut says, which must not wait for what never comes."""
    said: list[PgcdpError | None] = []

    def run() -> None:
        try:
            api.cut(found.name)
            said.append(None)
        except PgcdpError as error:
            said.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert said, f"a cut took more than {seconds} s"
    return said[0]


def healed(found: ProtectedSet) -> tuple[Differences, dict[str, Any]]:
    """`up --heal`: what it showed first, and what it says that it did."""
    seen: list[Differences] = []
    told = api.up(found.name, heal=seen.append)
    return seen[0], told


def assert_well(found: ProtectedSet, gap: dict[str, Any], last: int, before: int, count: int) -> None:
    """Production has all rows; points before the gap and behind it are right; all is captured again."""
    assert rows(found) == count
    found.wait_following()
    found.sql("insert into kept values (-1)")
    api.cut(found.name)
    assert api.info(found.name)["gaps"] == [gap]
    assert (gap["from_write"], gap["reason"]) == (last + 1, "lost")
    for write, there in ((last, before), (gap["to_write"] + 1, count)):
        with found.running_at(Target("write", write)) as box, box.connect() as connection:
            assert connection.execute("select count(*) from kept").fetchone() == (there,), write
    assert api.verify(found.name, Target("newest"))["ok"]
    assert all(each["ok"] for each in api.check(found.name, full=True)["checks"])
    api.down(found.name)
    found.assert_volume_is_newest()
    api.up(found.name)
    assert rows(found) == count + 1


@pytest.mark.parametrize(("what", "fs"), [("segments", "ext4"), ("directory", "xfs")])
def test_removed_under_a_set_that_runs(make_set: MakeSet, binaries_of: BindirOf, what: str, fs: str) -> None:
    found = a_set(make_set, binaries_of, fs)
    last = all_taken(found)
    if what == "segments":
        for file in segments(found):
            file.unlink()
    else:
        shutil.rmtree(found.config.journal)
    for number in range(200):
        found.sql(f"insert into kept values ({1000 + number})")
    wait_until(lambda: found.status()["error"], timeout=30, what="the agent says it")
    status = found.status()
    assert "are lost" in status["error"]
    assert f"pgcdp down {found.name}, then pgcdp up {found.name} --heal" in status["error"]
    said = cut_within(found, 60)
    assert said is not None
    assert "are lost" in said.message
    assert rows(found) == 301, "production runs on"

    api.down(found.name)
    with pytest.raises(DamageError) as told:
        api.up(found.name)
    assert f"pgcdp up {found.name} --heal" in str(told.value.hint)
    shown, up = healed(found)
    assert shown.unreadable
    assert shown.lost is not None
    assert shown.lost[0] > last, "what the agent had taken is there"
    assert shown.volumes["data"] > 0
    assert_well(found, up["gap"], shown.lost[0] - 1, 101, 301)


def test_damaged_after_a_stop_in_order(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A byte of what the store has not: with the agent dead, the journal is all that has it."""
    found = a_set(make_set, binaries_of)
    found.kill_agent()
    last = found.source().newest()
    found.sql("insert into kept select generate_series(1000, 1099)")
    api.clone(found.name, Target("newest"), name="late")
    api.down(found.name)
    newest, at = batch_behind(found, last)
    raw = bytearray(newest.read_bytes())
    raw[at + 200] ^= 1
    newest.write_bytes(raw)
    api.up(found.name)  # the volumes need nothing of it; the store does
    wait_until(lambda: found.status()["error"], timeout=30, what="the agent says it")
    assert f"pgcdp down {found.name}, then pgcdp up {found.name} --heal" in found.status()["error"]
    assert rows(found) == 201
    api.down(found.name)

    def no(found: Differences) -> None:
        raise PgcdpError("not confirmed")

    with pytest.raises(PreconditionError, match="is open, which only the journal had"):
        api.up(found.name, heal=no)
    api.destroy("late")
    before = {path.name: path.read_bytes() for path in found.config.journal.iterdir()}
    with pytest.raises(PgcdpError, match="not confirmed"):
        api.up(found.name, heal=no)
    assert {path.name: path.read_bytes() for path in found.config.journal.iterdir()} == before, "a look changes nothing"
    shown, up = healed(found)
    assert shown.lost is not None
    (aside,) = found.config.journal.glob("lost-*")
    assert (aside / newest.name).read_bytes() == raw
    assert_well(found, up["gap"], last, 101, 201)
    assert shown.lost[0] == last + 1


def test_lost_after_a_crash_it_is_not_healed(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Nobody knows whether the volumes have all that was answered: that is said, and nothing is changed."""
    found = a_set(make_set, binaries_of)
    all_taken(found)
    found.kill_both()
    away = found.root / "away"
    away.mkdir()
    for file in [*segments(found), found.config.journal / "applied"]:
        shutil.move(file, away / file.name)
    with pytest.raises(PgcdpError):
        api.up(found.name)
    with pytest.raises(PreconditionError, match="is missing: whether the volumes of main have all") as told:
        api.up(found.name, heal=lambda found: None)
    assert f"pgcdp restore --store {found.store} --to-directory" in str(told.value.hint)
    api.restore(None, Target("newest"), store=found.store, to_directory=found.root / "restored")
    for file in away.iterdir():
        shutil.move(file, found.config.journal / file.name)
    api.up(found.name)
    assert rows(found) == 101
    assert service.ask(found.config.paths, "status")["error"] is None


@pytest.mark.parametrize("known", ["by the state directory", "by the store"])
def test_an_older_copy_is_not_replayed(make_set: MakeSet, binaries_of: BindirOf, known: str) -> None:
    """It would write old blocks over newer ones, before anybody could see that the store is ahead of it."""
    found = a_set(make_set, binaries_of)
    found.kill_both()
    older = found.root / "older"
    shutil.copytree(found.config.journal, older)
    api.up(found.name)
    found.sql("insert into kept select generate_series(1000, 1999)")
    all_taken(found)
    found.kill_both()
    before = [each.backing.read_bytes() for each in found.config.volumes]
    newest, store = found.config.journal.rename(found.root / "newest"), found.store
    shutil.copytree(older, found.config.journal)
    ways: list[dict[str, Any]] = [{}, {"heal": lambda shown: None}]
    if known == "by the store":
        (found.config.paths.state / "parts.json").unlink()
        ways.append({"take_over": True})
    else:
        store = found.store.rename(found.root / "away")
    match = (
        "ended with write .* it is an older copy" if known == "by the store" else "it is an older copy, whose writes"
    )
    for way in ways:
        with pytest.raises(PreconditionError, match=match) as told:
            api.up(found.name, **way)
        assert f"pgcdp restore --store {found.store}" in str(told.value.hint)
    assert [each.backing.read_bytes() for each in found.config.volumes] == before
    store.rename(found.store)
    shutil.rmtree(found.config.journal)
    newest.rename(found.config.journal)
    api.up(found.name)
    assert rows(found) == 1101
    found.wait_following()
    api.down(found.name)
    found.assert_volume_is_newest()


def test_a_machine_that_was_set_back(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """With its volumes, journal and state of one moment, and a store that went on: it is said how it runs again."""
    found = a_set(make_set, binaries_of)
    found.allowed.append("it is an older copy")
    api.down(found.name)
    snapshot = found.root / "snapshot"
    shutil.copytree(found.config.paths.state, snapshot)
    api.up(found.name)
    found.sql("delete from kept")
    api.cut(found.name)
    api.down(found.name)
    shutil.rmtree(found.config.paths.state)
    shutil.copytree(snapshot, found.config.paths.state)
    with pytest.raises(PreconditionError, match=r"ended with write .* it is an older copy") as told:
        api.up(found.name)
    assert f"pgcdp unprotect {found.name} --unstored, then protect with another --store" in str(told.value.hint)
    api.unprotect(found.name, unstored=True)
    again = found.root / "another store"
    api.protect(found.name, found.pgdata, again, size=384 << 20, yes=True, bindir=found.binaries.directory)
    assert rows(found) == 101
    api.restore(None, Target("newest"), store=found.store, to_directory=found.root / "restored")


def test_a_journal_from_before_it_began_anew_comes_back(
    journal_disk: Path, make_set: MakeSet, binaries_of: BindirOf
) -> None:
    """Its disk was unmounted under the set; when that is mounted again, its writes have the numbers of newer ones."""
    found = make_set(
        binaries_of(15), size=384 << 20, journal=journal_disk / "main", journal_limit=256 << 20, segment_size=16 << 20,
        allowed=[*KILLED, *LOST],
    )  # fmt: skip
    found.sql("create table kept (n int)")
    api.cut(found.name)
    found.kill_agent()
    found.sql("insert into kept select generate_series(1, 20000)")
    mounted = volumes.mount_at(journal_disk)
    assert mounted is not None
    device = Path(mounted.source)
    volumes.unmount_lazily(journal_disk)
    found.sql("insert into kept values (20001)")
    api.down(found.name)
    shown, _ = healed(found)
    assert shown.lost is not None
    found.sql("delete from kept where n > 100")
    found.wait_following()
    all_taken(found)
    api.down(found.name)
    volumes.mount(device, journal_disk, "ext4")
    for heal in (None, lambda shown: None):
        with pytest.raises(PreconditionError, match="it is another one, whose writes would overwrite newer ones"):
            api.up(found.name, heal=heal)
    volumes.unmount(journal_disk)
    api.up(found.name)
    assert rows(found) == 100
    api.down(found.name)
    found.assert_volume_is_newest()
    shutil.rmtree(journal_disk / "main")
