"""The last writes before `unprotect` are in the store, or the cluster stays where it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from pgcdp import api, protecting
from pgcdp.capture import protect, volumes
from pgcdp.errors import PgcdpError, PreconditionError
from pgcdp.postgres import cluster
from pgcdp.records import Target
from pgcdp.sets import set_paths
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet

GONE = [r"the agent", r"error: ", r"warning: "]


@pytest.fixture
def found(make_set: MakeSet, binaries_of: BindirOf) -> Iterator[ProtectedSet]:
    found = make_set(binaries_of(15), size=512 << 20, allowed=GONE)
    found.sql("create table t (n int)")
    api.cut(found.name)
    yield found
    with suppress(PgcdpError):
        cluster.stop(found.pgdata)


def assert_stored(found: ProtectedSet, target: Target) -> None:
    """The store alone gives it."""
    place = found.root / "restored"
    api.restore(None, target, store=found.store, to_directory=place)
    assert (place / "PG_VERSION").exists()


@pytest.mark.parametrize("died", ["all", "the agent"])
def test_what_was_committed_last_is_stored_though_it_died(found: ProtectedSet, died: str) -> None:
    """The agent that comes up for it begins anew; until then what it says of itself is no answer."""
    found.sql("insert into t select generate_series(1, 1000)")
    last = found.durable()
    if died == "all":
        found.kill_both()
    else:
        found.kill_agent()
    api.unprotect(found.name)
    assert found.sql("select count(*) from t") == [(1000,)]
    assert_stored(found, Target("write", last))


def test_a_store_that_is_gone(found: ProtectedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protecting, "STORING_SECONDS", 1.0)
    aside = found.root / "aside"
    found.store.rename(aside)
    found.sql("insert into t select generate_series(1, 1000)")
    with pytest.raises(PreconditionError, match="does not take the last writes") as told:
        api.unprotect(found.name)
    assert "--unstored" in str(told.value.hint)
    assert found.sql("select count(*) from t") == [(1000,)]
    assert volumes.mount_at(found.pgdata) is not None
    assert api.status(found.name)["state"] == "capturing"
    api.unprotect(found.name, unstored=True)
    assert volumes.mount_at(found.pgdata) is None
    assert found.sql("select count(*) from t") == [(1000,)]
    aside.rename(found.store)
    assert_stored(found, Target("newest"))


@pytest.mark.parametrize("step", ["_remove_volumes", "_forget"])
def test_failing_when_its_settings_are_gone_the_same_command_ends_it(
    found: ProtectedSet, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(_: object) -> None:
        raise OSError(5, "Input/output error", "somewhere")

    with monkeypatch.context() as patched:
        patched.setattr(protect, step, fail)
        with pytest.raises((PgcdpError, OSError)):
            api.unprotect(found.name)
    command = [sys.executable, "-P", "-m", "pgcdp", "unprotect", found.name, "--yes"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set_paths(found.name).protect_state.exists()
    assert not (found.root / "journal").exists()
    assert found.sql("select count(*) from t") == [(0,)]
