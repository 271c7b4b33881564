"""Retention on a real cluster: what is left opens under Postgres, and what transactions did is listed as before."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

from pgcdp import api
from pgcdp.errors import TargetError
from pgcdp.fsio import write_atomic
from pgcdp.postgres.cluster import Binaries
from pgcdp.records import Span, Target
from pgcdp.recovery.expiring import Run, expiring
from pgcdp.recovery.sweeping import sweep
from pgcdp.store.retention import Plan, Policy
from pgcdp.units import parse_lsn
from tests.fix_sets import MakeSet, ProtectedSet
from tests.waiting import wait_until

HALF_WRITTEN = shutil.ignore_patterns(".*.new")
"""What an agent that runs is about to put in a file's place, such as that the store is still its own."""


def carry_out(found: ProtectedSet, plan: Plan) -> None:
    """What a policy would come to in months."""
    store = found.source().store
    with expiring(store):
        done = Run(store, Policy()).carry_out(plan)
    assert not done.failed

    def swept() -> bool:
        with expiring(store, wait=True):
            return not sweep(store).waiting

    if done.waiting:  # such as for the agent, which was just moving the image
        wait_until(swept, what="nobody reads what was let go of")


def listed(found: ProtectedSet) -> list[dict[str, Any]]:
    told = api.log(found.name, limit=None)
    assert told["unseen"] is None
    return [{key: each[key] for key in each if key not in ("interval", "statement")} for each in told["transactions"]]


def set_policy(found: ProtectedSet, **settings: str) -> None:
    file = found.config.paths.config_file
    text = file.read_text()
    for name, value in settings.items():
        text = re.sub(rf"(?m)^{name} = .*$", f'{name} = "{value}"', text)
    write_atomic(file, text.encode())  # the agent may be reading it


def rows_at(found: ProtectedSet, target: Target) -> int:
    with found.running_at(found.source().resolve(target)) as box, box.connect() as connection:
        return int(connection.execute("select count(*) from t").fetchall()[0][0])


@pytest.mark.timeout(900)
def test_boundaries_open_and_transactions_are_listed_after_all_kinds_of_expiry(
    make_set: MakeSet, pg_binaries: Binaries
) -> None:
    found = make_set(pg_binaries, settings={"autovacuum": "off"})  # whose transactions would be listed, too
    found.sql("create table t as select n as id from generate_series(1, 1000) n")
    rows, xids, numbers = {}, {}, []
    for step in range(8):
        with found.connect() as connection:
            connection.execute("delete from t where id %% 10 = %s", (step,))
            xids[step] = int(connection.execute(
                "with gone as (insert into t select 5000 + n from generate_series(1, 7) n returning 1) "
                "select txid_current(), count(*) from gone").fetchall()[0][0])  # fmt: skip
        numbers.append(int(api.cut(found.name)["number"]))
        rows[numbers[-1]] = int(found.sql("select count(*) from t")[0][0])
    kept = api.mark(found.name, "kept", keep=True)
    first = numbers[0]
    before = listed(found)
    wal = {each["xid"]: each for each in before}
    carry_out(found, Plan(thin=(first, first + 5), joins=(Span(first + 1, first + 3),)))
    assert listed(found) == before
    carry_out(found, Plan(joins=(Span(first + 1, first + 5),)))
    assert listed(found) == before, "joined with what was joined before"
    assert api.find(found.name, "delete from t")["total"] == 8
    for number in (first, first + 5, first + 6):
        assert rows_at(found, Target("boundary", number)) == rows[number]
    assert api.verify(found.name, Target("boundary", first + 5))["ok"]
    gone = wal[xids[3]]
    for target in (
        Target("xid", xids[3]), Target("xid", xids[3], exclusive=True), Target("lsn", parse_lsn(gone["lsn"])),
        Target("write", gone["write"]), Target("boundary", first + 3),
    ):  # fmt: skip
        with pytest.raises(TargetError, match="retention let go") as told:
            found.source().resolve(target)
        assert told.value.hint is not None
        assert f"--target-boundary {first} (" in told.value.hint
        assert f"--target-boundary {first + 5} (" in told.value.hint
    behind = wal[xids[7]]
    assert rows_at(found, Target("xid", xids[7])) == rows[numbers[7]]
    assert rows_at(found, Target("lsn", parse_lsn(behind["lsn"]), exclusive=True)) < rows[numbers[7]]
    shown = api.show(found.name, wal[xids[0]]["write"])
    assert xids[0] in [each["xid"] for each in shown["holds"]["transactions"]], "what it held is still known"
    assert api.check(found.name, full=True)["ok"]
    infos = {row["number"]: row for row in api.info(found.name)["intervals"]}
    assert (infos[first + 5]["first"], infos[first + 5]["restorable_by_write"]) == (first + 1, False)
    alone = found.root / "alone"
    shutil.copytree(found.store, alone, ignore=HALF_WRITTEN)
    place = found.root / "restored"
    api.restore(None, Target("boundary", first + 5), to_directory=place, store=alone)
    shutil.rmtree(place)
    shutil.rmtree(alone)
    carry_out(found, Plan(base=first + 5))
    assert found.source().base().number == first + 5
    assert rows_at(found, Target("boundary", first + 5)) == rows[first + 5]
    with pytest.raises(TargetError, match="before the oldest"):
        found.source().resolve(Target("write", gone["write"]))
    assert rows_at(found, Target("xid", xids[7])) == rows[numbers[7]]
    assert {each["xid"] for each in listed(found)} >= {xids[6], xids[7]}
    assert api.rebuild(found.name)["damages"] == []
    assert api.check(found.name, full=True)["ok"]
    assert found.source().resolve(Target("name", name="kept")).write == kept["write"]


@pytest.mark.timeout(600)
def test_the_agent_lets_go_of_what_the_settings_say(make_set: MakeSet, pg_binaries: Binaries) -> None:
    """A clone in the middle of what goes: its point stays, and it can step back to it."""
    found = make_set(pg_binaries)
    found.sql("create table t as select n as id from generate_series(1, 100) n")
    for step in range(3):
        found.sql(f"delete from t where id % 10 = {step}")
        api.cut(found.name)
    inside = found.source().intervals()[1]
    clone = api.clone(found.name, Target("write", inside.from_write + 1), name="inside")
    set_policy(found, keep_writes="0s")
    for _ in range(2):
        api.cut(found.name)

    def by_write() -> list[int]:
        return [row["number"] for row in api.info(found.name)["intervals"] if row["restorable_by_write"]]

    newest = int(api.cut(found.name)["number"])
    wait_until(lambda: by_write() == [inside.number, newest], what="the agent lets go", timeout=120)
    api.step(clone["name"], 1)
    api.step(clone["name"], -1)
    assert api.destroy(clone["name"])["destroyed"]
    newest = int(api.cut(found.name)["number"])
    wait_until(lambda: by_write() == [newest], what="the agent lets go of what the clone needed", timeout=120)
    told = {each["name"]: each for each in api.check(found.name)["checks"]}
    assert told["retention"]["ok"]
    assert "keep_writes 0s" in told["retention"]["detail"]
