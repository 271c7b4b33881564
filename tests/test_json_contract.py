"""The JSON of every command on a real protected cluster: the keys of docs/json.md, their types, the exit codes."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
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

ROOT = Path(__file__).resolve().parents[1]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
LSN = re.compile(r"[0-9A-F]{1,8}/[0-9A-F]{1,8}")
Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Maybe:
    """A value of that shape, or null."""

    shape: Any


POINT: Shape = {"write": int, "lsn": Maybe(LSN), "interval": Maybe(int), "boundary": Maybe(int), "time": TIME,
                "note": Maybe(str)}  # fmt: skip
WINDOW: Shape = {"from_time": TIME, "to_time": TIME, "from_write": int, "to_write": int}
CHECK: Shape = {"name": str, "ok": bool, "seconds": float, "detail": str}
OUTSIDE: Shape = {"name": str, "place": str}
RUNS = [{"first": int, "last": int}]
EXPIRED: Shape = {"time": TIME, "by": str, "oldest": Maybe(int), "joined": RUNS, "thinned": RUNS}
LOST_WRITES: Shape = {"from_write": int, "to_write": Maybe(int)}
DAMAGE: Shape = {"file": str, "offset": int, "message": str, "still": str, "lost": Maybe(LOST_WRITES)}
SCRUB: Shape = {
    "state": re.compile("running|stopped|waiting|never"), "by": Maybe(str), "began": Maybe(TIME), "ended": Maybe(TIME),
    "oldest": Maybe(TIME), "bytes": int, "total": int, "interval": Maybe(int), "block": Maybe(int), "damages": int,
}  # fmt: skip
INTERVAL: Shape = {
    "number": int,
    "from_write": int,
    "to_write": int,
    "from_time": TIME,
    "to_time": TIME,
    "reason": str,
    "checkpoint_lsn": Maybe(LSN),
    "redo_lsn": Maybe(LSN),
    "timeline": Maybe(int),
    "next_xid": Maybe(int),
    "writes": int,
    "bytes_written": int,
    "blocks_changed": int,
    "stored": {"writes": int, "backward": int, "forward": int, "index": int, "transactions": int},
    "first": int,
    "restorable_by_write": bool,
    "lost": [LOST_WRITES],
    "outside": Maybe([OUTSIDE]),
    "verified": Maybe({"ok": bool}),
}
TABLE: Shape = {
    **dict.fromkeys(("database", "schema", "name"), str),
    **dict.fromkeys(("inserted", "updated", "deleted", "rows"), int),
    **dict.fromkeys(("truncated", "dropped", "rewritten"), bool),
    "share": float,
}
TRANSACTION: Shape = {
    "xid": int,
    "status": str,
    "time": TIME,
    "lsn": LSN,
    "write": int,
    "timeline": int,
    "interval": Maybe(int),
    "database": Maybe(str),
    "share": float,
    "tables": [TABLE],
    "objects": [{"what": str, "database": Maybe(str), "name": str}],
    "statement": Maybe(str),
}
FULL: Shape = {"room": int, "bytes_per_second": Maybe(float), "over_seconds": Maybe(float), "seconds": Maybe(float)}
STATUS: Shape = {
    "set": str,
    "dsn": str,
    "state": re.compile("capturing|tracking|stalled|stopped"),
    "postgres": re.compile("running|stopped"),
    "last_write": int,
    "durable_write": int,
    "stored_write": int,
    "intervals": int,
    "lag_seconds": Maybe(float),
    "journal": {"bytes": int, "limit": int},
    "until_full": {"journal": Maybe(FULL), "store": Maybe(FULL), "volumes": [{"name": str, **FULL}]},
    "recovery_window": WINDOW,
    "outside": Maybe([OUTSIDE]),
    "scrub": Maybe(SCRUB),
    "held": {"holder": Maybe(int), "restarts": int, "resent": int, "problem": Maybe(str)},
    "volumes": [{"name": str, "device": Maybe(str), "backing": str, "mountpoint": str, "bytes": int}],
}
RESTART: Shape = {"time": TIME, "why": re.compile("died|upgrade"), "pid": Maybe(int), "seconds": float}
END: Shape = {"xid": int, "time": TIME, "lsn": LSN, "write": int, "status": str}
RESOLVED: Shape = {"recovery_point": POINT, "seconds": float, "outside": Maybe([OUTSIDE]),
                   "last_in": Maybe(END), "first_out": Maybe(END), "out": Maybe(int), "also_out": [END]}  # fmt: skip
RESTORE: Shape = {
    **RESOLVED,
    "to": str,
    "bytes": int,
    "tablespaces": [{"oid": int, "name": Maybe(str), "directory": str}],
}
SHOW: Shape = {"write": int, "time": TIME, "volume": Maybe(str), "kind": str, "offset": int, "length": int,
               "interval": Maybe(int), "holds": {}}  # fmt: skip
CLONE: Shape = {"name": str, "dsn": str, "last_transaction": Maybe({"xid": int, "time": TIME}), "seconds": float,
                "recovery": {"from_lsn": Maybe(LSN), "to_lsn": Maybe(LSN), "seconds": float},
                **RESOLVED}  # fmt: skip
CLONES: Shape = {"name": str, "set": Maybe(str), "store": Maybe(str),
                 "state": re.compile("running|opening|stopped|dead|damaged"),
                 "dsn": Maybe(str), "recovery_point": Maybe(POINT), "created": Maybe(TIME), "expires": Maybe(TIME),
                 "written_bytes": int, "memory_bytes": int, "problem": Maybe(str)}  # fmt: skip
STEP: Shape = {**CLONE, "from": POINT, "writes_passed": int, "writes": [SHOW], "rewinds_passed": int,
               "transactions_in": [END], "transactions_out": [END],
               "transactions": {"in": int, "out": int}}  # fmt: skip

GAP: Shape = {"from_write": int, "to_write": Maybe(int), "from_time": TIME, "to_time": Maybe(TIME), "reason": str,
              "blocks": int}  # fmt: skip
LOST: Shape = {"database": str, "schema": str, "name": str, "inserted": int, "updated": int, "deleted": int}
IN_PLACE: Shape = {
    **RESOLVED, "to": str, "bytes": int, "set": str, "undo": Maybe(str), "boundary": int, "timeline": int,
    "verified": bool, "down_seconds": float,
    "lost": {"transactions": Maybe(int), "oldest": Maybe(END), "newest": Maybe(END), "tables": [LOST]},
    "followers": [{"kind": str, "name": str, "where": str, "command": str}],
}  # fmt: skip


def fits(value: Any, shape: Any, where: str = "") -> list[str]:
    """Where `value` is not of that shape. More keys than named are allowed."""
    if isinstance(shape, Maybe):
        return [] if value is None else fits(value, shape.shape, where)
    if isinstance(shape, re.Pattern):
        return [] if isinstance(value, str) and shape.fullmatch(value) else [f"{where}: {value!r}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [line for i, item in enumerate(value) for line in fits(item, shape[0], f"{where}[{i}]")]
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            return [f"{where}: {value!r} is no object"]
        missing = [f"{where}.{key} is missing" for key in shape if key not in value]
        return missing + [
            line for key in shape if key in value for line in fits(value[key], shape[key], f"{where}.{key}")
        ]
    if shape is float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        right = isinstance(value, shape) and not (shape is int and isinstance(value, bool))
    return [] if right else [f"{where}: {value!r} is no {shape.__name__}"]


class Protected:
    """A new cluster behind capture, with a root of its own, as `pgcdp protect --initdb` makes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {**os.environ, "PGCDP_ROOT": str(directory / "root")}

    def json(self, *words: str, code: int = 0) -> Any:
        """What a command prints: one line, one object, and nothing on standard error."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pgcdp", *words, "--output", "json"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            timeout=250,
            cwd="/",
            check=False,
        )
        assert (done.returncode, done.stderr) == (code, ""), f"{words}: {done.stdout}{done.stderr}"
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout)

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
            command, capture_output=True, text=True, env=self.environment, timeout=250, cwd="/", check=False
        )


EXPIRE: Shape = {
    "set": str,
    "dry_run": bool,
    "policy": {
        "keep_writes": Maybe(float), "keep_boundaries": Maybe(float), "keep_hourly": Maybe(float),
        "keep_daily": Maybe(float), "least_free": int,
    },
    "oldest": Maybe({"boundary": int, "time": TIME}),
    "joined": [{"first": int, "last": int}],
    "thinned": [int],
    "boundaries": [int],
    "writes": [{"from_write": int, "to_write": int, "from_time": TIME, "to_time": TIME}],
    "kept": [{"name": str, "write": int}],
    "views": [{"write": int}],
    "bytes": int,
    "waiting": Maybe(str),
    "failed": [str],
}  # fmt: skip


@pytest.fixture(scope="module")
def protected() -> Iterator[Protected]:
    directory = Path(tempfile.mkdtemp(prefix="pgcdp-json-", dir="/var/tmp"))
    directory.chmod(0o755)
    found = Protected(directory)
    try:
        words = ["--pgdata", str(directory / "data"), "--store", str(directory / "store"), "--size", "512M"]
        value = found.json("protect", "main", *words, "--journal-limit", "512M", "--initdb", "--yes")
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
    file.write_text(re.sub(r"(?m)^keep_writes = .*$", 'keep_writes = "0s"', settings))
    store = Store.open(protected.directory / "store")
    try:
        with FileLock(store.path / "expire.lock", "a test"):  # the agent would do it, too
            told = protected.json("expire", "--dry-run")
            assert fits(told, EXPIRE) == []
            assert told["thinned"]
            assert told["bytes"]
            assert told["policy"]["keep_writes"] == 0.0
            assert {each["name"] for each in told["kept"]} == {"never"}
            assert "single writes that go" in protected.text("expire", "--dry-run")
            assert protected.json("expire", code=2)["error"]["hint"] == "add --yes, or run it on a terminal to be asked"
            assert protected.json("expire", "--yes", code=6)["error"]["kind"] == "precondition"
        done = protected.json("expire", "--yes")
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
