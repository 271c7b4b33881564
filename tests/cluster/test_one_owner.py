"""Two sets, two roots, two machines: one backing, one journal, one store. Each is refused and told who has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pgcdp import api
from pgcdp.capture import home, volumes
from pgcdp.capture.sharing import bytes_of
from pgcdp.errors import PreconditionError
from pgcdp.store import lease
from tests.fix_postgres import BindirOf
from tests.fix_sets import MakeSet, ProtectedSet
from tests.namespaces import LET_GO
from tests.waiting import wait_until

CODE = "import sys; from pgcdp.cli.main import main; sys.exit(main(sys.argv[1:]))"

ENDED = ["no look at the catalogs", "canceling statement due to user request"]
"""What the agent says when Postgres is stopped just as it looks."""
RENEWING = r"\.owner\.json\.new: no such file"
"""What it says when a test, which stands for another machine, writes as it renews."""


@contextmanager
def looped(backing: Path, *options: str) -> Iterator[Path]:
    device = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", *options, str(backing)],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    try:
        yield Path(device)
    finally:
        volumes.detach_loop(Path(device))  # waits: whoever looks at it keeps it, and may be given it right after that


def protect_another(found: ProtectedSet, name: str, **options: Any) -> None:
    api.protect(
        name, found.root / f"pgdata-{name}", options.pop("store", found.root / f"store-{name}"), fs="ext4", initdb=True,
        yes=True, version=15, bindir=found.binaries.directory, journal_limit=1 << 30, **options,
    )  # fmt: skip


def test_a_backing_of_another_set_is_refused_by_whatever_path(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=ENDED)
    (volume,) = found.config.volumes
    other = found.root / "link.img"
    other.symlink_to(volume.backing)
    for running in (True, False):
        if not running:
            api.down(found.name)
        with looped(other) as device:
            assert bytes_of(device).overlap(bytes_of(volume.backing))
            link = found.root / f"device-{running}"
            link.symlink_to(device)
            for path in (device, link):
                with pytest.raises(PreconditionError, match=r'is that of set "main"') as told:
                    protect_another(found, "second", volume=path)
                captured = f", captured by process {found.engine.status().pid}," if running else ","
                assert f'is that of set "main"{captured} which knows it as' in told.value.message
    assert found.source().newest()


def test_a_backing_that_somebody_has_attached_is_refused(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=ENDED)
    (volume,) = found.config.volumes
    api.down(found.name)
    for options in ((), ("--offset", "1048576"), ("--read-only",)):
        with looped(volume.backing, *options) as device:
            with pytest.raises(PreconditionError, match=rf"is in use as {device}") as told:
                found.up()
            assert f"losetup --detach {device}" in str(told.value.hint)
            assert not found.capturing()
    found.up()


def test_a_store_of_another_set_is_refused_and_named(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=ENDED)
    with pytest.raises(
        PreconditionError, match=rf"is the store of set main \({found.config.set_id}\), cluster \d+, on "
    ):
        protect_another(found, "second", size=384 << 20, store=found.store)


def as_machine(root: Path, state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of pgcdp as another machine runs it: machine-id is another one there."""
    other = root / "machine-id"
    other.write_text("f" * 32 + "\n")
    script = f'{LET_GO}; mount --bind {other} /etc/machine-id && exec "$@"'
    environment = {**os.environ, "PGCDP_ROOT": str(state), "KEEP": str(root)}
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-P", "-c", CODE, *words],
        env=environment, capture_output=True, text=True, cwd="/", check=False,
    )  # fmt: skip


def test_a_second_machine_at_the_same_disks_is_refused(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=ENDED)
    state = found.root / "state"
    done = as_machine(found.root, state, "up", "main")
    assert done.returncode == 6, done.stderr
    assert "belongs to" in done.stderr
    assert "--take-over" in done.stderr
    done = as_machine(found.root, state, "up", "main", "--take-over")
    assert done.returncode == 6, done.stderr
    assert "is in use by" in done.stderr, "the first one renews it still"
    found.wait_following()
    api.down(found.name)
    done = as_machine(found.root, state, "up", "main")
    assert (done.returncode, "which let go of it on" in done.stderr) == (6, True), done.stderr
    found.up()
    found.wait_following()


def test_a_copied_root_is_noticed_and_taken_over_when_that_is_wanted(
    make_set: MakeSet, binaries_of: BindirOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=ENDED)
    found.sql("create table kept as select 1 as n")
    api.cut(found.name)
    api.down(found.name)
    first, copy = found.root / "state", found.root / "copy"
    shutil.copytree(first / "etc", copy / "etc")
    monkeypatch.setenv("PGCDP_ROOT", str(copy))
    with pytest.raises(PreconditionError, match=r"belongs to .*, which let go of it on"):
        found.up()
    (found.store / lease.FILE).unlink()
    with pytest.raises(PreconditionError, match=r"the journal .* is that of set main on .*: a copy of it, perhaps"):
        found.up()
    assert not found.capturing()
    api.up(found.name, take_over=True)
    found.wait_following()
    assert found.sql("select n from kept") == [(1,)]
    api.down(found.name)
    monkeypatch.setenv("PGCDP_ROOT", str(first))
    with pytest.raises(PreconditionError, match="belongs to"):
        found.up()
    api.up(found.name, take_over=True)
    found.wait_following()
    assert (found.config.journal / home.FILE).exists()


def test_an_agent_whose_store_was_taken_writes_no_more(make_set: MakeSet, binaries_of: BindirOf) -> None:
    found = make_set(binaries_of(15), size=384 << 20, allowed=[*ENDED, r"was taken over by", r"belongs to ", RENEWING])
    api.cut(found.name)
    store = found.source().store
    owner = lease.owner_of(store)
    assert owner is not None
    there = owner.place.__class__("/", "f" * 32, "", "other", "boot")

    def taken() -> bool:
        if "taken over" in str(found.status()["error"]):
            return True
        now = lease.owner_of(store)
        if now is None or not now.place.is_same(there):  # the agent was just renewing it
            with suppress(FileNotFoundError):
                lease._write(store, there, 1)
        return False

    wait_until(taken, timeout=30, what="the agent sees it")
    before = len(found.source().intervals())
    found.sql("create table more as select 1")
    with pytest.raises(PreconditionError):
        api.cut(found.name)
    assert len(found.source().intervals()) == before
    assert found.status()["state"] == "capturing"
    lease.take_over(store, owner.place)
    found.wait_following()
    api.cut(found.name)
    assert len(found.source().intervals()) == before + 1
