"""The JSON of every command on a real protected cluster: the keys of docs/json.md, their types, the exit codes."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pgcdp import config, service
from pgcdp.capture import attach
from pgcdp.errors import PgcdpError
from pgcdp.fsio import FileLock
from pgcdp.growing import may_resize_ext4
from pgcdp.postgres import cluster, session
from pgcdp.store.layout import Store
from tests.json_shapes import (
    CHECK,
    CLONE,
    CLONES,
    DAMAGE,
    EXPIRE,
    EXPIRED,
    GAP,
    IN_PLACE,
    INTERVAL,
    LOST_WRITES,
    POINT,
    RESTART,
    RESTORE,
    SCRUB,
    SHOW,
    STATUS,
    STEP,
    TABLE,
    TRANSACTION,
    WINDOW,
    Maybe,
    fits,
)
from tests.scratch import scratch_directory
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]


class Protected:
    """A new cluster behind capture, with a root of its own, as `pgcdp protect --initdb` makes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "PGCDP_ROOT": str(directory / "root")}

    def json(self, *words: str, code: int = 0) -> Any:
        """What a command prints: one line, one object, and nothing on standard error."""
        done = self._run((*words, "--output", "json"))
        assert (done.returncode, done.stderr) == (code, ""), f"{words}: {done.stdout}{done.stderr}"
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout)

    def json_when_free(self, *words: str) -> Any:
        """The same of a command that is refused (6) as long as the agent does just that by itself."""

        def done() -> Any:
            found = self._run((*words, "--output", "json"))
            assert (found.returncode, found.stderr) in ((0, ""), (6, "")), f"{words}: {found.stdout}{found.stderr}"
            return json.loads(found.stdout) if found.returncode == 0 else None

        return wait_until(done, what=f"{words}")

    def take_down(self) -> None:
        """Whatever a failure left running ends; what the logs say is shown with the failure."""
        file = self.directory / "root/etc/pgcdp/main.toml"
        if file.exists():
            settings = config.parse_config(file.read_text(), "main", file, self.directory / "root")
            for log in (settings.paths.agent_log, settings.paths.engine_log):
                print(f"{log.name}:\n{log.read_text()}")
            with suppress(PgcdpError):
                service.stop(settings, timeout=30)
            attach.discard(settings)
        if (self.directory / "data").is_dir():
            cluster.kill_leftovers(self.directory / "data")

    def text(self, *words: str) -> str:
        """The same for people."""
        done = self._run(words)
        done.check_returncode()
        return done.stdout

    def notes(self, *words: str) -> str:
        """What it says to people beside the result."""
        done = self._run(words)
        done.check_returncode()
        return done.stderr

    def failing(self, *words: str) -> list[str]:
        """What it says to people when it fails, in lines."""
        done = self._run(words)
        assert done.returncode
        return done.stderr.splitlines()

    def _run(self, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "pgcdp", *words]
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=self.environment, timeout=250,
            cwd="/", check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def protected(free_port: int) -> Iterator[Protected]:
    directory = scratch_directory("json")
    found = Protected(directory)
    try:
        words = ["--pgdata", str(directory / "data"), "--store", str(directory / "store"), "--size", "512M"]
        value = found.json(
            "protect", "main", *words, "--journal-limit", "512M", "--initdb", "--port", str(free_port), "--yes"
        )
        assert fits(value, {**STATUS, "warnings": [{"name": str, "detail": str, "hint": Maybe(str)}]}) == []
        found.json("cut")
        yield found
        assert fits(found.json("unprotect", "--yes"), {"set": str, "pgdata": str, "store": str}) == []
        cluster.stop(directory / "data")
    finally:
        found.take_down()
        shutil.rmtree(directory)


def test_status(protected: Protected) -> None:
    value = protected.json("status")
    assert fits(value, STATUS) == []
    assert value["set"] == "main"
    assert value["state"] == "capturing"
    assert value["stored_write"] <= value["durable_write"] <= value["last_write"]
    assert "recovery window" in protected.text("status")


def test_cut_and_info(protected: Protected) -> None:
    closed = protected.json("cut")
    assert fits(closed, INTERVAL) == []
    value = protected.json("info")
    assert fits(value, {"set": str, "recovery_window": WINDOW, "intervals": [INTERVAL], "expired": [EXPIRED]}) == []
    assert fits(value, {"restarts": [RESTART]}) == []
    assert fits(value, {"damages": [DAMAGE], "lost": [LOST_WRITES]}) == []
    assert value["damages"] == value["lost"] == []
    assert value["gaps"] == []
    assert value["intervals"][-1]["number"] >= closed["number"]
    assert protected.json("info", "--store", str(protected.directory / "store"))["set"] == "main"
    assert protected.text("info").count("\n") >= len(value["intervals"])


def test_mark_and_show(protected: Protected) -> None:
    for name, words in (("", "the name of the mark is empty"), ("ü" * 513, "has 1026 bytes, more than 1024")):
        failed = protected.json("mark", name, code=2)["error"]
        assert words in failed["message"]
        assert "pgcdp mark before-upgrade" in failed["hint"]
    value = protected.json("mark", "here")
    assert fits(value, {"set": str, "name": str, "write": int}) == []
    shown = protected.json("show", str(value["write"]))
    assert fits(shown, SHOW) == []
    assert (shown["kind"], shown["holds"]["mark"]) == ("mark", "here")
    assert "mark" in protected.text("show", str(value["write"]))
    owner = {"file": Maybe(str), "offset": Maybe(int), "length": int, "relation": Maybe(dict), "earlier": bool}
    for write in range(value["write"] - 5, value["write"]):
        told = protected.json("show", str(write))
        if told["kind"] == "write":
            assert fits(told["holds"], {"what": str, "files": [owner]}) == []
            assert told["holds"]["what"] in protected.text("show", str(write))


def test_log_and_find(protected: Protected) -> None:
    file = protected.directory / "root/etc/pgcdp/main.toml"
    settings = config.parse_config(file.read_text(), "main", file, protected.directory / "root")
    with session.connect_as_client(session.Dsn.of(settings)) as connection:
        for sql in ("create table found as select generate_series(1, 9) as id", "delete from found"):
            session.query(connection, sql)
    shape = {"transactions": [TRANSACTION], "total": int, "unknown": [], "unseen": Maybe(str), "left_out": int,
             "note": Maybe(str), "gaps": [GAP]}  # fmt: skip
    for words in (["log"], ["find", "delete from found"]):
        value = protected.json(*words)
        assert fits(value, shape) == []
        assert value["transactions"][0]["tables"][0]["name"] == "found"
        assert "found" in protected.text(*words)
    with session.connect_as_client(session.Dsn.of(settings)) as connection:
        for sql in ("create database gone", "drop database gone"):
            session.query(connection, sql)
    value = protected.json("find", "drop database gone")
    assert fits(value, shape) == []
    assert value["transactions"][0]["objects"] == [{"what": "database", "database": None, "name": "gone"}]
    assert "database gone  dropped" in protected.text("find", "drop database gone")
    value = protected.json("find", "select 1", code=3)
    assert value["error"]["kind"] == "target"
    with session.connect_as_client(session.Dsn.of(settings)) as connection:
        for _ in range(21):
            session.query(connection, "insert into found values (1)")
        session.query(connection, "insert into found select generate_series(1, 50)")
    words = ["restore", "--before", "insert into found", "--to-directory", str(protected.directory / "none")]
    failed = protected.json(*words, code=3)["error"]
    assert fits(failed, {"message": str, "hint": str, "candidates": [TRANSACTION], "more": int}) == []
    assert failed["message"] == '23 transactions did "insert into found"'
    assert (len(failed["candidates"]), failed["more"]) == (20, 3)
    first, earliest = failed["candidates"][0], min(failed["candidates"], key=lambda each: each["write"])
    listed = protected.json("find", "insert into found")["transactions"]
    assert [each["xid"] for each in failed["candidates"]] == [each["xid"] for each in listed]
    assert failed["hint"] == (
        f"choose one, such as --target-xid {first['xid']} --exclusive for the first one listed, "
        f"--target-xid {earliest['xid']} --exclusive for the earliest one listed"
    )
    newest = [each["xid"] for each in protected.json("find", "insert into found", "--newest")["transactions"]]
    told = protected.notes("find", "insert into found", "--newest")
    assert f"just before the first one listed (xid {newest[0]}): pgcdp restore --target-xid {newest[0]} " in told
    assert f"just before the earliest one listed (xid {newest[-1]}): pgcdp restore --target-xid {newest[-1]} " in told
    assert "earliest" not in protected.notes("find", "insert into found", "--newest", "--limit", "1")
    assert protected.json("find", "delete from found; delete from found", code=2)["error"]["kind"] == "usage"
    lines = protected.failing(*words)
    assert lines[0] == f"error: {failed['message']}:"
    assert [line.split()[1] for line in lines[2:22]] == [str(each["xid"]) for each in failed["candidates"]]
    assert lines[22:] == ["  and 3 more, which pgcdp find lists", f"hint: {failed['hint']}"]


def test_restore(protected: Protected) -> None:
    image = protected.directory / "restored.img"
    value = protected.json("restore", "--to-image", str(image))
    assert fits(value, RESTORE) == []
    assert value["to"] == str(image)
    image.unlink()
    directory = protected.directory / "restored"
    boundary = protected.json("info")["intervals"][-1]["number"]
    value = protected.json("restore", "--target-boundary", str(boundary), "--to-directory", str(directory))
    assert fits(value, RESTORE) == []
    assert value["recovery_point"]["boundary"] == boundary
    shutil.rmtree(directory)


def test_verify_and_its_exit_codes(protected: Protected) -> None:
    results = {"ok": bool, "results": [{"recovery_point": POINT, "ok": bool, "seconds": float, "checks": [CHECK]}]}
    sql = protected.directory / "assertion.sql"
    sql.write_text("SELECT count(*) > 0 FROM pg_class;\n")
    value = protected.json("verify", "--sql", str(sql))
    assert fits(value, results) == []
    assert value["ok"] is True
    sql.write_text("SELECT count(*) = 0 FROM pg_class;\n")
    value = protected.json("verify", "--sql", str(sql), code=4)
    assert fits(value, results) == []
    assert value["ok"] is False
    sql.unlink()


def test_clone_step_and_destroy(protected: Protected) -> None:
    value = protected.json("clone", "--ttl", "1h")
    assert fits(value, CLONE) == []
    listed = protected.json("clones")
    assert fits(listed, {"clones": [CLONES]}) == []
    assert [each["name"] for each in listed["clones"]] == [value["name"]]
    assert value["name"] in protected.text("clones")
    assert fits(protected.json("step", value["name"], "-2"), STEP) == []
    assert protected.json("destroy", value["name"]) == {"name": value["name"], "destroyed": True}
    gone = protected.json("destroy", value["name"], code=3)
    assert gone["error"]["kind"] == "target"


def test_check(protected: Protected) -> None:
    value = protected.json("check", "--full")
    assert (
        fits(value, {"ok": bool, "checks": [{**CHECK, "warning": bool, "kind": Maybe(str), "hint": Maybe(str)}]}) == []
    )
    assert value["ok"] is True
    scrub = protected.json("status")["scrub"]
    assert fits(scrub, SCRUB) == []
    assert (scrub["by"], scrub["state"], scrub["damages"]) == ("check", "waiting", 0)
    assert scrub["age_seconds"] is not None
    alone = protected.json("check", "--store", str(protected.directory / "store"))
    assert [each["name"] for each in alone["checks"]] == ["store", "merged increments"]
    assert alone["ok"]


def test_grow(protected: Protected) -> None:
    size = protected.json("status")["volumes"][0]["bytes"] + (64 << 20)
    if not may_resize_ext4():
        assert protected.json("grow", str(size), code=6)["error"]["kind"] == "precondition"
        return
    value = protected.json("grow", str(size))
    room = {"before": int, "after": int}
    assert fits(value, {"set": str, "volume": str, "bytes": int, "before": int, "filesystem": room}) == []
    assert value["bytes"] == size


def test_expire(protected: Protected) -> None:
    """What would go, that it is asked about, that it goes, and that what is kept stays."""
    kept = protected.json("mark", "never", "--keep")
    mark = {"set": str, "name": str, "write": int, "earlier": [], "kept": bool, "existed": bool}
    assert fits(kept, mark) == []
    again = protected.json("mark", "never", "--keep")
    assert (again["write"], again["existed"]) == (kept["write"], True), "one that is there is kept, none is set"
    assert [each["write"] for each in protected.json("info")["marks"] if each["name"] == "never"] == [kept["write"]]
    for step in range(3):
        protected.json("mark", f"between-{step}")
        protected.json("cut")
    assert protected.json("expire")["thinned"] == [], "by default nothing goes"
    file = protected.directory / "root/etc/pgcdp/main.toml"
    settings = file.read_text()
    store = Store.open(protected.directory / "store")
    try:
        with FileLock(store.path / "expire.lock", "a test", wait=60):  # the agent would do it, too
            file.write_text(re.sub(r"(?m)^keep_writes = .*$", 'keep_writes = "0s"', settings))
            told = protected.json("expire", "--dry-run")
            assert fits(told, EXPIRE) == []
            assert told["thinned"]
            assert told["bytes"]
            assert told["policy"]["keep_writes"] == 0.0
            assert {each["name"] for each in told["kept"]} == {"never"}
            assert "single writes that go" in protected.text("expire", "--dry-run")
            assert protected.json("expire", code=2)["error"]["hint"] == "add --yes, or run it on a terminal to be asked"
            assert protected.json("expire", "--yes", code=6)["error"]["kind"] == "precondition"
        done = protected.json_when_free("expire", "--yes")
        assert fits(done, EXPIRE) == []
        refused = protected.json("mark", "between-1", "--keep", code=3)["error"]
        assert "retention let go" in refused["message"], "there is nothing left to keep"
        assert not protected.json("expire", "--dry-run")["thinned"]
    finally:
        file.write_text(settings)
    info = protected.json("info")
    assert fits(info, {"expired": [EXPIRED]}) == []
    thinned = {n for each in info["expired"] for run in each["thinned"] for n in range(run["first"], run["last"] + 1)}
    assert thinned == set(told["thinned"])
    assert {each["by"] for each in info["expired"]} <= {"agent", f"pgcdp expire, user {getpass.getuser()}"}
    assert "let go of by" in protected.text("info")
    rows = info["intervals"]
    gone = [row for row in rows if not row["restorable_by_write"]]
    assert {row["number"] for row in gone} == set(told["thinned"])
    (home,) = [row for row in rows if row["from_write"] <= kept["write"] <= row["to_write"]]
    assert home["restorable_by_write"]
    assert fits(protected.json("show", str(gone[-1]["to_write"] - 1)), SHOW) == []
    inside = ["restore", "--target-write", str(gone[-1]["to_write"] - 1), "--to-image", "/nothing"]
    assert f"--target-boundary {gone[-1]['number']} (" in protected.json(*inside, code=3)["error"]["hint"]
    assert protected.json("verify", "--target-boundary", str(gone[-1]["number"]))["ok"]
    assert protected.json("check", "--full")["ok"]
    assert protected.json("mark", "never", "--unkeep")["write"] == kept["write"]
    assert protected.json("mark", "never", "--unkeep", code=3)["error"]["kind"] == "target"


def test_rebuild(protected: Protected) -> None:
    value = protected.json("rebuild")
    assert fits(value, {"set": str, "intervals": int, "unread": [{"first": int, "last": int}], "damages": [str]}) == []
    assert value["intervals"] == len(protected.json("info")["intervals"])


@pytest.mark.parametrize(
    "target",
    [
        ["--target-write", "99999999999"],
        ["--target-write", "0"],
        ["--target-boundary", "99999"],
        ["--target-time", "2001-01-01"],
    ],
)
def test_target_outside_the_window_exits_3(protected: Protected, target: list[str]) -> None:
    place = protected.directory / "nothing"
    value = protected.json("restore", *target, "--to-directory", str(place), code=3)
    assert fits(value, {"error": {"code": int, "kind": str, "message": str, "hint": str}}) == []
    assert (value["error"]["code"], value["error"]["kind"]) == (3, "target")
    assert not place.exists()


def test_set_name_in_use_and_cluster_protected_twice_exit_6(protected: Protected) -> None:
    words = ["--store", str(protected.directory / "other"), "--size", "512M", "--yes"]
    pgdata = ["--pgdata", str(protected.directory / "data")]
    assert "main" in protected.json("protect", "main", *pgdata, *words, code=6)["error"]["message"]
    assert "main" in protected.json("protect", "second", *pgdata, *words, code=6)["error"]["message"]


def test_restore_in_place(protected: Protected) -> None:
    protected.json("mark", "here")
    target = ["restore", "--target-name", "here", "--in-place"]
    assert protected.json(*target, code=2)["error"]["hint"] == "add --yes, or run it on a terminal to be asked"
    value = protected.json(*target, "--yes")
    assert fits(value, IN_PLACE) == []
    assert value["verified"] is True
    (mark,) = [each["write"] for each in protected.json("info")["marks"] if each["name"] == value["undo"]]
    inside = ["restore", "--target-write", str(mark + 1), "--to-image", str(protected.directory / "nothing")]
    assert "no recovery point is there" in protected.json(*inside, code=3)["error"]["message"]
    assert protected.json("show", str(mark + 1))["holds"]["what"] == "rewind"
    undone = protected.json("restore", "--target-name", value["undo"], "--in-place", "--yes")
    assert fits(undone, IN_PLACE) == []
    assert undone["timeline"] == value["timeline"] + 1


def test_down_and_up(protected: Protected) -> None:
    value = protected.json("down")
    assert fits(value, STATUS) == []
    assert value["state"] == "stopped"
    assert protected.json("status")["state"] == "stopped"
    value = protected.json("up")
    assert fits(value, STATUS) == []
    assert value["state"] == "capturing"


def test_a_changed_volume_exits_6_and_is_healed(protected: Protected) -> None:
    (volume,) = protected.json("down")["volumes"]
    subprocess.run(["tune2fs", "-L", "other", volume["backing"]], check=True, capture_output=True)
    refused = protected.json("up", code=6)["error"]
    assert "volume data of main" in refused["message"]
    assert "pgcdp up main --heal" in refused["hint"]
    assert protected.json("up", "--heal", code=2)["error"]["hint"] == "add --yes, or run it on a terminal to be asked"
    assert protected.json("status")["state"] == "stopped"
    value = protected.json("up", "--heal", "--yes")
    assert fits(value, {**STATUS, "gap": GAP}) == []
    assert value["state"] == "capturing"
    gap = value["gap"]
    assert protected.json("info")["gaps"][-1:] == [gap]
    assert (
        f"GAP of {gap['blocks']} blocks (changed), writes {gap['from_write']} to {gap['to_write']}"
        in protected.text("info")
    )
    inside = ["restore", "--target-write", str(gap["from_write"]), "--to-image", str(protected.directory / "nothing")]
    assert f"--target-write {gap['to_write'] + 1}" in protected.json(*inside, code=3)["error"]["hint"]
    assert protected.json("show", str(gap["from_write"]))["holds"]["what"] == "gap"


def test_documented_keys_are_the_pinned_ones() -> None:
    text = (ROOT / "docs" / "json.md").read_text("utf-8")
    documented = set(re.findall(r'"(\w+)"', text))
    several = (STATUS, INTERVAL, POINT, WINDOW, CHECK, RESTORE, IN_PLACE, TRANSACTION, TABLE, CLONE, CLONES, STEP, GAP)
    for shape in (*several, EXPIRE):
        keys = set(shape)
        for inner in shape.values():
            keys |= set(inner) if isinstance(inner, Mapping) else set()
        assert keys <= documented
