"""Data of the cluster outside of the set: said at each cut, and no recovery point pretends to have it (truth 8)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.cli.main import main
from pgcdp.errors import PreconditionError
from pgcdp.records import Target
from tests.fix_postgres import BindirOf, postgres_user
from tests.fix_sets import MakeSet, ProtectedSet

NOISE = [r"lies outside of the set, in .*: it is not captured"]


def check_of(found: ProtectedSet) -> list[tuple[bool, str, str | None]]:
    """What `check` says of data outside."""
    rows = [each for each in api.check(found.name)["checks"] if each["name"] == "data outside the set"]
    return [(each["ok"], each["detail"], each["hint"]) for each in rows]


def new_space(found: ProtectedSet, name: str) -> tuple[Path, int]:
    """A tablespace somewhere with a table of 1000 rows, `in_NAME`; where it is, and its OID."""
    place = found.root / "elsewhere" / name
    place.mkdir(parents=True)
    os.chown(place, postgres_user().uid, postgres_user().gid)
    found.sql(f"create tablespace {name} location '{place}'")
    found.sql(f"create table in_{name} tablespace {name} as select generate_series(1, 1000) as n")
    return place, int(found.sql(f"select oid from pg_tablespace where spcname = '{name}'")[0][0])


def test_a_tablespace_made_since_is_said_until_it_is_gone(
    make_set: MakeSet, binaries_of: BindirOf, capsys: pytest.CaptureFixture[str]
) -> None:
    found = make_set(binaries_of(15), allowed=NOISE)
    assert api.cut(found.name)["outside"] == []
    assert found.status()["outside"] == []
    assert check_of(found) == [(True, "none", None)]
    place, oid = new_space(found, "late")
    row = {"name": f"pg_tblspc/{oid}", "place": str(place)}

    # Told at the next cut, with what takes it in.
    number = api.cut(found.name)["number"]
    assert [each["outside"] for each in api.info(found.name)["intervals"]] == [[], [row]]
    assert found.status()["outside"] == [row]
    (ok, detail, hint), (_, warning, _) = check_of(found)
    assert (ok, detail) == (False, f"not captured: pg_tblspc/{oid} in {place}")
    assert f"pgcdp protect main --tablespace {oid}=SIZE" in str(hint)
    assert "1 intervals are incomplete" in warning
    for words in (["status", "main"], ["info", "main"], ["check", "main"]):
        main(words)
        assert str(place) in capsys.readouterr().out, words

    # No point there pretends to have it.
    assert api.resolve(found.name, Target("boundary", number))["outside"] == [row]
    assert api.resolve(found.name, Target("boundary", number - 1))["outside"] == []
    for target in (Target("boundary", number), Target("newest")):
        with pytest.raises(PreconditionError, match="not part of what was restored"):
            api.verify(found.name, target)
        with pytest.raises(PreconditionError, match="not part of what was restored"):
            api.restore(found.name, target, to_directory=found.root / "restored")
        assert not (found.root / "restored").exists()
    assert api.verify(found.name, Target("boundary", number - 1))["ok"]

    # It is kept with the store. The interval in which it goes lacks it still; what comes behind is whole again.
    found.kill_agent()
    found.up()
    found.sql("drop table in_late")
    found.sql("drop tablespace late")
    api.cut(found.name)
    api.cut(found.name)
    api.rebuild(found.name)
    told = [each["outside"] for each in api.info(found.name)["intervals"]]
    assert told[:3] == [[], [row], [row]]
    assert told[-1] == []
    assert found.status()["outside"] == []
    assert [ok for ok, _, _ in check_of(found)] == [True]
    assert api.verify(found.name, Target("newest"))["ok"]


@pytest.mark.timeout(900)
def test_production_does_not_go_on_with_the_files_of_now(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """Of a tablespace outside of the set there is no other state: a rewind would give its xids twice, and no undo."""
    found = make_set(binaries_of(15), allowed=NOISE)
    found.sql("create table kept as select 1 as n")
    api.cut(found.name)
    before = found.durable()
    new_space(found, "late")
    made = found.durable()  # no checkpoint since: the link is made by recovery alone
    with pytest.raises(PreconditionError, match=r"lies outside of the set, in .*: .* could not be undone") as caught:
        rewind(found, Target("write", before))
    assert "takes it into the set" in str(caught.value.hint)
    boundary = api.cut(found.name)["number"]
    found.sql("drop table in_late")
    found.sql("drop tablespace late")
    for target, why in (
        (Target("write", made), "recovery makes a tablespace"),
        (Target("boundary", boundary), "leads to"),
    ):
        with pytest.raises(PreconditionError, match=why):
            rewind(found, target)
    assert found.sql("select n from kept") == [(1,)], "nothing has changed"
    found.sql("drop table kept")
    told = rewind(found, Target("write", before))
    assert told["verified"]
    assert found.sql("select n from kept") == [(1,)]
    assert rewind(found, Target("name", name=told["undo"]))["verified"]
    assert found.sql("select to_regclass('kept')") == [(None,)]


def rewind(found: ProtectedSet, target: Target) -> dict[str, Any]:
    """`pgcdp restore --in-place --yes`."""
    told: dict[str, Any] = api.rewind(found.name, target, agree=lambda told: None)
    return told
