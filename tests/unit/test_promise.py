"""Settings and states under which a captured write is no point to go back to."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgcdp.capture import kernel, promises
from pgcdp.errors import PreconditionError
from pgcdp.postgres import promise
from pgcdp.postgres.control import State
from pgcdp.postgres.promise import Unlogged
from pgcdp.records import Remark

ON = {"fsync": "on", "full_page_writes": "on", "wal_init_zero": "on"}


def levels(found: object) -> dict[str, str]:
    return {each.name: each.level for each in found}  # type: ignore[attr-defined]


def test_the_usual_settings_are_right() -> None:
    assert set(levels(promise.settings(ON.get)).values()) == {"ok"}


@pytest.mark.parametrize(
    ("name", "level"), [("fsync", "failure"), ("full_page_writes", "failure"), ("wal_init_zero", "warning")]
)
def test_each_setting_that_voids_the_promise_is_found_when_it_is_off(name: str, level: str) -> None:
    found = list(promise.settings({**ON, name: "off"}.get))
    assert [each.level for each in found if each.name == f"setting {name}"] == [level]
    assert [each.level for each in found if each.name != f"setting {name}"] == ["ok", "ok"]
    assert all(name in (each.hint or "") for each in found if each.level != "ok")


@pytest.mark.parametrize("signal", ["standby.signal", "recovery.signal"])
def test_a_standby_that_does_not_run_is_known_by_its_file(tmp_path: Path, signal: str) -> None:
    (tmp_path / signal).touch()
    assert levels(promise.at_rest(tmp_path, 15, State.SHUT_DOWN, ON.__getitem__))["standby"] == "failure"


@pytest.mark.parametrize("state", [State.SHUT_DOWN_IN_RECOVERY, State.IN_ARCHIVE_RECOVERY])
def test_a_standby_that_does_not_run_is_known_by_its_pg_control(tmp_path: Path, state: State) -> None:
    assert levels(promise.at_rest(tmp_path, 15, state, ON.__getitem__))["standby"] == "failure"
    assert levels(promise.at_rest(tmp_path, 15, State.SHUT_DOWN, ON.__getitem__))["standby"] == "ok"


@pytest.mark.parametrize(
    ("major", "runs", "hint"), [(14, True, "pg_stop_backup"), (17, True, "rm "), (14, False, "start")]
)
def test_a_backup_label_is_found_and_mended_as_the_version_can(
    tmp_path: Path, major: int, runs: bool, hint: str
) -> None:
    assert promise.exclusive_backup(tmp_path, major, runs=runs).level == "ok"
    (tmp_path / "backup_label").touch()
    found = promise.exclusive_backup(tmp_path, major, runs=runs)
    assert found.level == "failure"
    assert hint in (found.hint or "")


def test_the_largest_unlogged_tables_are_named_and_all_are_counted() -> None:
    many = [Unlogged("shop", "public", f"t{number}", number << 20) for number in range(30)]
    (found,) = promise.unlogged(many, {})
    assert found.level == "warning"
    assert "30 of 435.0 MiB" in found.detail
    assert "shop: public.t29 (29.0 MiB)" in found.detail
    assert "public.t3 " not in found.detail
    assert "and 20 more" in found.detail


def test_a_database_that_was_not_looked_at_does_not_pass_for_one_without_unlogged_tables() -> None:
    (found,) = promise.unlogged([], {"shop": "a table is locked"})
    assert found.level == "warning"
    assert "shop" in found.detail


def test_protect_refuses_a_failure_and_goes_on_with_a_warning() -> None:
    warning = Remark("one", "warning", "a", "b")
    assert promises.refuse([Remark("none", "ok", "c"), warning]) == [warning]
    with pytest.raises(PreconditionError, match="two: void") as caught:
        promises.refuse([warning, Remark("two", "failure", "void", "mend it")])
    assert caught.value.hint == "mend it"


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("4.19.0-26-amd64", ["failure"]),
        ("6.1.0-18-amd64", ["warning", "warning"]),
        ("6.8.12", ["warning", "warning"]),
        ("6.9.0", ["warning"]),
        ("6.11.3-generic", ["warning"]),
        ("6.12.0", ["ok"]),
        ("7.0-rc1", ["ok"]),
        ("unknown", ["warning"]),
    ],
)
def test_an_old_kernel_is_told_with_what_it_lacks(release: str, expected: list[str]) -> None:
    assert [each.level for each in kernel.release_remarks(release)] == expected
