"""A rewind with something in its way: production must not stop for it, and who meets damage must know the way on."""

from __future__ import annotations

import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api, rewinding
from pgcdp.errors import DamageError, PgcdpError, PreconditionError
from pgcdp.progress import Progress
from pgcdp.records import Target
from pgcdp.store.image_lock import image_held
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.flipping import flipped
from tests.waiting import wait_until

FILLER = "insert into filler select n, repeat(md5(random()::text || n), 30) from generate_series(1, 20000) n"


def agreed(resolved: dict[str, Any]) -> None:
    """Yes to everything."""


def with_a_ledger(make_set: MakeSet, binaries_of: BindirOf) -> tuple[ProtectedSet, int]:
    """A set with one row too many in its ledger; the write in front of that."""
    found = make_set(binaries_of(15), size=384 << 20, settings={"autovacuum": "off"})
    found.sql("create table ledger (n int)")
    found.sql("insert into ledger values (1)")
    api.cut(found.name)
    before = found.durable()
    found.sql("insert into ledger values (2)")
    return found, before


def ledger(found: ProtectedSet) -> list[int]:
    return [row[0] for row in found.sql("select n from ledger order by n")]


def test_postgres_is_not_stopped_while_somebody_reads_the_image(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """No boundary would be cut at its shutdown: it stayed down for ten minutes, and came back as it was."""
    found, before = with_a_ledger(make_set, binaries_of)
    told: list[Progress] = []
    done: list[dict[str, Any]] = []
    with image_held(found.source().store):
        postmaster = found.sql("select pg_postmaster_start_time()")
        thread = threading.Thread(
            target=lambda: done.append(
                api.rewind(found.name, Target("write", before), agree=agreed, progress=told.append)
            )
        )
        thread.start()
        wait_until(lambda: any("reads the image" in each.step for each in told), timeout=60, what="that it waits")
        assert found.sql("select pg_postmaster_start_time()") == postmaster
        assert not done
    thread.join()
    assert done[0]["verified"]
    assert ledger(found) == [1]


def test_a_reader_that_came_in_between_costs_production_seconds(
    make_set: MakeSet, binaries_of: BindirOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint at the shutdown was passed over: none comes behind it, so nothing is waited for."""
    found, before = with_a_ledger(make_set, binaries_of)
    with image_held(found.source().store):
        monkeypatch.setattr(rewinding, "_await_image", lambda *arguments: None)
        monkeypatch.setattr(rewinding, "CUT_SECONDS", 3600.0)
        with pytest.raises(PreconditionError, match="no boundary was cut at the shutdown"):
            api.rewind(found.name, Target("write", before), agree=agreed)
        assert ledger(found) == [1, 2]
        assert rewinding.pending(found.config.paths) is None


def test_damage_met_half_way_names_what_brings_production_back(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """The nearest point alone does not tell that production is down, nor that all of it is there still."""
    found, _ = with_a_ledger(make_set, binaries_of)
    found.sql("create table filler (n int, t text)")
    found.sql(FILLER)
    api.cut(found.name)
    before = found.durable()
    found.sql("update filler set n = n + 1")
    found.sql("vacuum full filler")
    number = api.cut(found.name)["number"]
    found.sql("insert into ledger values (3)")
    file = found.store / "intervals" / f"{number:010}" / "backward"
    with flipped(file, file.stat().st_size // 2, 3):
        with pytest.raises(DamageError, match="production is down") as caught:
            api.rewind(found.name, Target("write", before), agree=agreed)
        assert "nearest" in str(caught.value.hint)
        with pytest.raises(DamageError, match="production is down") as again:
            api.up(found.name)
        left = rewinding.pending(found.config.paths)
        assert left is not None
        for each in (caught, again):
            assert f"pgcdp restore {found.name} --in-place --target-name {left.mark}" in str(each.value.hint)
        assert api.rewind(found.name, Target("name", name=left.mark), agree=agreed)["verified"]
        assert ledger(found) == [1, 2, 3]
        assert found.sql("select count(*), min(n) from filler") == [(20000, 2)]


def test_a_rewind_whose_proof_failed_is_told_as_done_with_its_undo(make_set: MakeSet, binaries_of: BindirOf) -> None:
    """A failed command would be taken for a rewind that did not happen, and be given again."""
    found, _ = with_a_ledger(make_set, binaries_of)
    found.sql("create table filler (n int, t text)")
    found.sql(FILLER)
    path = found.sql("select pg_relation_filepath('filler')")[0][0]
    api.cut(found.name)
    found.wait_following()
    before = found.durable()
    found.sql("insert into ledger values (3)")
    image = found.store / "image" / f"{found.config.volumes[0].name}.img"
    with flipped(image, place_of(found.pgdata / path), 3):
        with pytest.raises(PgcdpError, match=r"was rewound to write \d+ and serves") as caught:
            api.rewind(found.name, Target("write", before), agree=agreed)
        mark = next(each["name"] for each in reversed(api.info(found.name)["marks"]) if "rewind" in each["name"])
        assert f"pgcdp restore {found.name} --in-place --target-name {mark} undoes" in str(caught.value.hint)
    assert ledger(found) == [1, 2]
    assert api.rewind(found.name, Target("name", name=mark), agree=agreed)["verified"]
    assert ledger(found) == [1, 2, 3]


def place_of(file: Path) -> int:
    """Where the first block of a file lies on its volume, in bytes."""
    told = subprocess.run(["filefrag", "-v", "-b4096", file], check=True, capture_output=True, text=True).stdout
    found = re.search(r"^ +0: +0\.\. +\d+: +(\d+)\.\.", told, re.MULTILINE)
    assert found is not None, told
    return int(found[1]) * 4096
