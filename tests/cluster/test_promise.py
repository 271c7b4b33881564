"""Settings and states that void the promise: found before protection, where they are refused, and in service."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.capture import protect, volumes
from pgcdp.capture.clocks import CLOCK
from pgcdp.cli.main import main
from pgcdp.errors import PreconditionError
from pgcdp.postgres import cluster
from pgcdp.postgres.cluster import Binaries
from pgcdp.serving.keeping import Keeping
from pgcdp.units import format_size
from tests.fix_house import House
from tests.fix_postgres import BindirOf, Live, MakeCluster, postgres_user
from tests.fix_sets import STOPPED, MakeSet, ProtectedSet
from tests.waiting import wait_until

Json = dict[str, Any]


def named(value: Json, name: str) -> list[Json]:
    return [each for each in value["checks"] if each["name"] == name]


def only(value: Json, name: str) -> Json:
    (found,) = named(value, name)
    return found


def level(value: Json, name: str) -> str:
    found = named(value, name)
    assert found, name
    if not all(each["ok"] for each in found):
        return "failure"
    return "warning" if any(each["warning"] for each in found) else "ok"


def failures(value: Json) -> list[str]:
    return [each["name"] for each in value["checks"] if not each["ok"]]


def turn(live: Live | House, name: str, value: str) -> None:
    """ALTER SYSTEM and reload, until sessions see it."""
    with live.connect() as connection:
        connection.execute(f"alter system set {name} = {value}".encode())
        connection.execute("select pg_reload_conf()")

    def seen() -> bool:
        with live.connect() as connection:
            row = connection.execute(f"show {name}".encode()).fetchone()
        return row == (value,)

    wait_until(seen, what=f"{name} = {value}")


# --- before protection


def test_a_cluster_that_is_right_passes_and_nothing_is_changed(
    make_cluster: MakeCluster, pg_binaries: Binaries, tmp_path: Path
) -> None:
    live = make_cluster(pg_binaries)
    before = sorted(str(each) for each in live.pgdata.iterdir())
    value = api.check_beforehand(live.pgdata, tmp_path / "store", tmp_path / "journal")
    assert failures(value) == []
    assert value["ok"]
    assert level(value, "setting fsync") == level(value, "standby") == level(value, "unlogged tables") == "ok"
    assert level(value, "disks") == "warning"  # both are below one directory
    assert sorted(str(each) for each in live.pgdata.iterdir()) == before
    assert not (tmp_path / "store").exists()
    live.stop()
    assert failures(api.check_beforehand(live.pgdata)) == []


def test_check_of_a_cluster_that_is_not_protected_has_the_exit_codes_of_any_check(
    make_cluster: MakeCluster, binaries_of: BindirOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = make_cluster(binaries_of(15))
    words = ["check", "--pgdata", str(live.pgdata), "--store", str(tmp_path / "store")]
    assert main(words) == 0
    assert " warning " in capsys.readouterr().out
    assert main([*words, "--journal", str(live.pgdata / "journal")]) == 6
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "is inside the data directory" in out
    assert main([*words, "--full"]) == 2
    assert main(["check", "main", *words[1:]]) == 2
    assert main(["check", "--store", str(tmp_path)]) == 6, "a store alone, and there is none"
    assert main(["check", "--pgdata", str(tmp_path)]) == 6
    assert "is not a data directory" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
def test_a_setting_that_voids_the_promise_is_found_and_protect_refuses_it(house: House, name: str) -> None:
    """Of the cluster as it runs, and of one that does not: by its files then."""
    turn(house, name, "off")
    for running in (True, False):
        if not running:
            cluster.stop(house.pgdata)
        value = api.check_beforehand(house.pgdata)
        assert failures(value) == [f"setting {name}"]
        assert f"{name} = on" in only(value, f"setting {name}")["hint"]
        with pytest.raises(PreconditionError, match=f"setting {name}: off"):
            protect.protect(house.request())
        assert volumes.mount_at(house.pgdata) is None
        assert (house.postmaster() is not None) is running
    house.start()
    turn(house, name, "on")
    assert failures(api.check_beforehand(house.pgdata)) == []


def test_unlogged_tables_are_listed_with_their_sizes(make_cluster: MakeCluster, pg_binaries: Binaries) -> None:
    live = make_cluster(pg_binaries)
    live.sql("create database shop")
    live.sql("create unlogged table cart as select repeat('x', 1000) as what from generate_series(1, 8000)", "shop")
    live.sql("create unlogged table empty (n int)")
    live.sql("create table kept as select 1 as n")
    value = api.check_beforehand(live.pgdata)
    found = only(value, "unlogged tables")
    size = format_size(live.sql("select pg_total_relation_size('cart')", "shop")[0][0])
    assert found["ok"]
    assert found["warning"]
    assert f"2 of {size}" in found["detail"]
    assert f"shop: public.cart ({size})" in found["detail"]
    assert "postgres: public.empty (0 B)" in found["detail"]
    assert "kept" not in found["detail"]
    assert "SET LOGGED" in found["hint"]
    if pg_binaries.major >= 15:
        live.sql("create unlogged sequence numbers")
        live.sql("create unlogged table numbered (n serial, m int generated always as identity)")
        told = only(api.check_beforehand(live.pgdata), "unlogged tables")["detail"]
        assert "postgres: public.numbers (" in told
        assert told.startswith("4 of"), "a column's sequence is its table's"
        live.sql("drop sequence numbers")
        live.sql("drop table numbered")

    # A table that a DDL holds does not keep the check waiting; what was not seen is said.
    with live.connect("shop") as holder:
        holder.execute("begin")
        holder.execute("lock table cart in access exclusive mode")
        told = named(api.check_beforehand(live.pgdata), "unlogged tables")
        assert any("database shop was not looked at" in each["detail"] for each in told)
        holder.execute("rollback")
    live.allowed.append("canceling statement due to lock timeout")


def test_a_standby_is_refused(make_cluster: MakeCluster, pg_binaries: Binaries) -> None:
    """While it runs, and when it does not."""
    live = make_cluster(pg_binaries)
    live.stop()
    live.allowed.append("specified neither")
    (live.pgdata / "standby.signal").touch()
    shutil.chown(live.pgdata / "standby.signal", live.user.name)
    assert failures(api.check_beforehand(live.pgdata)) == ["standby"]
    live.start()
    wait_until(lambda: live.sql("select pg_is_in_recovery()") == [(True,)], what="a standby that answers")
    value = api.check_beforehand(live.pgdata)
    assert failures(value) == ["standby"]
    assert "pg_promote" in only(value, "standby")["hint"]
    live.sql("select pg_promote()")
    wait_until(lambda: live.sql("select pg_is_in_recovery()") == [(False,)], what="the promotion")
    assert failures(api.check_beforehand(live.pgdata)) == []


def test_a_backup_label_is_found(make_cluster: MakeCluster, pg_binaries: Binaries) -> None:
    live = make_cluster(pg_binaries)
    (live.pgdata / "backup_label").write_text("START WAL LOCATION: 0/2000028\n")
    assert failures(api.check_beforehand(live.pgdata)) == ["exclusive backup"]
    live.stop()
    assert failures(api.check_beforehand(live.pgdata)) == ["exclusive backup"]


# --- in service


def test_what_turns_wrong_in_service_is_found_and_its_hint_mends_it(make_set: MakeSet, pg_binaries: Binaries) -> None:
    found = make_set(pg_binaries, allowed=[*STOPPED, "specified neither", "recovery is in progress"])
    value = api.check(found.name)
    assert failures(value) == []
    _settings(found)
    _rights(found)
    _modes(found)
    _clock(found)
    _unlogged(found)
    _label(found)
    _standby(found)
    assert failures(api.check(found.name)) == []
    unmended = [each["name"] for each in api.check(found.name)["checks"] if each["warning"] and not each["hint"]]
    assert unmended == [], "each warning says what to do"


def _clock(found: ProtectedSet) -> None:
    """What one agent has seen of it, the next one tells, too."""
    assert level(api.check(found.name), "clock") == "ok"
    keeping, write = Keeping(found.config), found.durable()
    keeping.remember({"event": CLOCK, "write": write, "to_ns": 10**18, "seconds": 3600.0})
    keeping._writer.shutdown()
    row = only(api.check(found.name), "clock")
    assert row["warning"]
    assert "1 h 0 min ahead" in row["detail"]
    assert f"before write {write}" in row["detail"]


def _unlogged(found: ProtectedSet) -> None:
    found.sql("create unlogged table cart as select 1 as n")
    row = only(api.check(found.name), "unlogged tables")
    assert row["warning"]
    assert "postgres: public.cart" in row["detail"]
    found.sql(row["hint"].partition(",")[0].replace("...", "cart"))
    assert level(api.check(found.name), "unlogged tables") == "ok"


def _label(found: ProtectedSet) -> None:
    label = found.pgdata / "backup_label"
    label.write_text("START WAL LOCATION: 0/2000028\n")
    row = only(api.check(found.name), "exclusive backup")
    assert not row["ok"]
    if found.binaries.major >= 15:
        assert os.system(row["hint"]) == 0
    label.unlink(missing_ok=True)
    assert level(api.check(found.name), "exclusive backup") == "ok"


def _standby(found: ProtectedSet) -> None:
    """Somebody made one of it while it was down."""
    cluster.stop(found.pgdata)
    signal = found.pgdata / "standby.signal"
    signal.touch()
    shutil.chown(signal, "postgres")
    cluster.start(found.config.cluster.command_line, found.pgdata, postgres_user(), found.root / "standby.log")
    wait_until(lambda: found.sql("select pg_is_in_recovery()") == [(True,)], what="a standby that answers")
    row = only(api.check(found.name), "standby")
    assert not row["ok"]
    found.sql(row["hint"].rpartition(": ")[2])
    wait_until(lambda: found.sql("select pg_is_in_recovery()") == [(False,)], what="the promotion")
    found.wait_following()


def _settings(found: ProtectedSet) -> None:
    for name in ("fsync", "full_page_writes", "wal_init_zero"):
        found.sql(f"alter system set {name} = off")
        found.sql("select pg_reload_conf()")
        wait_until(partial(_shows, found, name, "off"), what=f"{name} off")
        wanted = "warning" if name == "wal_init_zero" else "failure"
        assert level(api.check(found.name), f"setting {name}") == wanted
        found.sql(f"alter system reset {name}")
        found.sql("select pg_reload_conf()")
        wait_until(partial(_shows, found, name, "on"), what=f"{name} on")


def _shows(found: ProtectedSet, name: str, value: str) -> bool:
    return found.sql(f"show {name}") == [(value,)]


def _rights(found: ProtectedSet) -> None:
    found.sql("create role reports")
    found.sql("alter role pgcdp createdb")
    found.sql("grant reports to pgcdp")
    row = only(api.check(found.name), "role pgcdp")
    assert not row["ok"]
    assert "CREATEDB" in row["detail"]
    assert "member of reports" in row["detail"]
    for statement in row["hint"].removeprefix("as a superuser: ").split("; "):
        found.sql(statement)
    assert level(api.check(found.name), "role pgcdp") == "ok"


def mode_of(path: Path) -> int:
    """Who may do what with a file or directory; 0 of a link, and of what has gone: the agent goes on meanwhile."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        return 0 if stat.S_ISLNK(mode) else stat.S_IMODE(mode)
    return 0


def _modes(found: ProtectedSet) -> None:
    for what, place in (("store", found.config.store), ("journal", found.config.journal)):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert [each for each in place.rglob("*") if mode_of(each) & 0o077] == []
        assert only(api.check(found.name), f"access to the {what}")["detail"] == "root alone"
        place.chmod(0o750)
        row = only(api.check(found.name), f"access to the {what}")
        assert not row["ok"]
        assert "0750" in row["detail"]
        assert os.system(row["hint"]) == 0
        assert only(api.check(found.name), f"access to the {what}")["detail"] == "root alone"


def test_a_store_in_a_directory_that_was_there_is_closed_to_others(make_set: MakeSet, pg_binaries: Binaries) -> None:
    found = make_set(pg_binaries, protect=False)
    for place in (found.store, found.root / "journal"):
        place.mkdir(mode=0o755)
    shutil.chown(found.store, "postgres")
    found.protect(size=768 << 20, settings={}, journal_limit=1 << 30, journal=found.root / "journal")
    for place in (found.store, found.root / "journal"):
        assert (stat.S_IMODE(place.stat().st_mode), place.stat().st_uid) == (0o700, 0)
