"""Bad input: a clear error with a hint, the right exit code, and nothing changed. Real runs of the program."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgcdp import config
from tests.scratch import scratch_directory

UNPRIVILEGED = 65534
"""Number of the user nobody."""


_AS_USER = """
import importlib, os, pkgutil, sys
import pgcdp.api, pgcdp.cli
for room in pkgutil.iter_modules(pgcdp.cli.__path__):
    importlib.import_module(f"pgcdp.cli.{room.name}")
user = int(sys.argv[1])
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
sys.exit(pgcdp.cli.main.main(sys.argv[2:]))
"""
"""The program run by another user, who need not be able to read where it is installed."""


class Program:
    """`pgcdp` with a root of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.root.mkdir()
        self.environment = {**os.environ, "PGCDP_ROOT": str(self.root)}
        self.environment.pop("PGCDP_DEBUG", None)

    def run(self, *words: str, user: int | None = None) -> subprocess.CompletedProcess[str]:
        how = ["-m", "pgcdp"] if user is None else ["-c", _AS_USER, str(user)]
        return subprocess.run(
            [sys.executable, "-P", *how, *words],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=self.environment,
            cwd="/",
            timeout=60,
            check=False,
        )

    def refused(self, code: int, *words: str, user: int | None = None) -> tuple[str, str]:
        """Runs it twice, as text and as JSON; both must end with `code`, say the same, and change nothing.

        Gives message and hint.
        """
        before = self.contents()
        done = self.run(*words, user=user)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        # Before it may be said how far the work had come.
        found = re.search(r"^error: (.+)\nhint: (.+)\n\Z", done.stderr, re.M)
        assert found is not None, done.stderr
        message, hint = found[1], found[2]
        assert message[:1] == message[:1].lower() or message.split()[0].isupper() or message[0] in '"/'
        assert not message.endswith(".")
        as_json = self.run(*words, "--output", "json", user=user)
        assert as_json.returncode == code
        assert as_json.stderr == ""
        told = json.loads(as_json.stdout)
        assert set(told) == {"error"}
        assert set(told["error"]) == {"code", "kind", "message", "hint"}
        assert told["error"]["code"] == code
        assert (told["error"]["message"], told["error"]["hint"]) == (message, hint)
        assert self.contents() == before
        return message, hint

    def contents(self) -> list[tuple[str, int]]:
        """All files but those below run/, where locks come and stay until the next boot."""
        files = [file for file in sorted(self.directory.rglob("*")) if self.root / "run" not in [file, *file.parents]]
        return [(str(file), file.stat().st_size if file.is_file() else 0) for file in files]


@pytest.fixture
def program() -> Iterator[Program]:
    directory = scratch_directory("codes")
    yield Program(directory)
    shutil.rmtree(directory)


# --- 2: wrong usage


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "nonsense"),
        (["status", "--nonsense"], "--nonsense"),
        (["status", "one", "two"], "two"),
        (["protect", "main", "--store", "/s"], "--pgdata"),
        (["protect", "main", "--pgdata", "/p", "--store", "/s", "--size", "huge", "--yes"], '"huge" is not a size'),
        (["protect", "main", "--pgdata", "/p", "--store", "/s", "--fs", "ntfs", "--yes"], "ntfs"),
        (
            ["protect", "main", "--pgdata", "/p", "--store", "/s", "--size", "1G", "--volume", "/dev/x", "--yes"],
            "--volume and --size",
        ),
        (["protect", "main", "--pgdata", "/p", "--store", "/s", "--size", "1G"], "not confirmed"),
        (
            ["protect", "main", "--pgdata", "/p", "--store", "/s", "--cut", "1min", "--cut", "5min", "--yes"],
            "a second time",
        ),
        (["restore", "main", "--target-write", "twelve", "--to-directory", "/d"], '"twelve" is not a write number'),
        (["restore", "main", "--target-write", "-3", "--to-directory", "/d"], '"-3" is not a write number'),
        (["restore", "main", "--target-boundary", "1.5", "--to-directory", "/d"], '"1.5" is not a boundary number'),
        (["restore", "main", "--target-time", "noon", "--to-directory", "/d"], '"noon" is not a time'),
        (
            ["restore", "main", "--target-write", "1", "--target-boundary", "2", "--to-directory", "/d"],
            "--target-write and --target-boundary",
        ),
        (["restore", "main"], "--to-image, --to-directory or --in-place"),
        (["restore", "main", "--to-image", "/i", "--to-directory", "/d"], "--to-image, --to-directory or --in-place"),
        (["restore", "main", "--to-image", "/i", "--store", "/nowhere/at/all"], "/nowhere/at/all"),
        (["verify", "main", "--sql", "/nowhere/at/all.sql"], "/nowhere/at/all.sql"),
        (["info", "main", "--store", "/"], "give"),
        (["check", "main", "--store", "/"], "give"),
        (["check", "main", "--rate", "1M"], "--rate needs --full"),
        (["show", "main", "many"], '"many" is not a write number'),
        (["show"], "missing argument WRITE"),
        (["mark", "one", "two", "three"], '"three"'),
        (["status", "Not A Name"], '"Not A Name" is not a set name'),
    ],
)
def test_wrong_usage_exits_2(program: Program, words: list[str], says: str) -> None:
    message, hint = program.refused(2, *words)
    assert says in f"{message}\n{hint}"


@pytest.mark.parametrize("verb", ["status", "info", "cut", "up", "down", "rebuild", "check", "verify"])
def test_no_set_at_all_exits_2(program: Program, verb: str) -> None:
    message, hint = program.refused(2, verb)
    assert message == "no volume set is configured"
    assert "pgcdp protect" in hint


def test_help_exits_0(program: Program) -> None:
    done = program.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "protect" in done.stdout
    assert program.run("restore", "--help").returncode == 0


def test_no_command_shows_the_help(program: Program) -> None:
    done = program.run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "Commands:" in done.stderr


def test_relative_root_exits_2(program: Program) -> None:
    program.environment["PGCDP_ROOT"] = "somewhere"
    message, _ = program.refused(2, "status")
    assert 'PGCDP_ROOT is "somewhere"' in message


# --- 6: a precondition is missing


@pytest.mark.parametrize(
    "words",
    [
        ["status", "main"],
        ["info", "main"],
        ["cut", "main"],
        ["mark", "main", "here"],
        ["show", "main", "1"],
        ["up", "main"],
        ["down", "main"],
        ["rebuild", "main"],
        ["check", "main"],
        ["verify", "main"],
        ["unprotect", "main", "--yes"],
        ["restore", "main", "--to-directory", "/nowhere/at/all"],
    ],
)
def test_no_such_set_exits_6(program: Program, words: list[str]) -> None:
    message, hint = program.refused(6, *words)
    assert 'no volume set "main"' in message
    assert "pgcdp protect" in hint


def _protect(program: Program, pgdata: Path, **other: str) -> list[str]:
    options = {"store": str(program.directory / "store"), "size": "1G"} | other
    words = ["protect", "main", "--pgdata", str(pgdata), "--yes"]
    for name, value in options.items():
        words += [f"--{name}", value]
    return words


def test_no_such_directory_exits_6(program: Program) -> None:
    message, _ = program.refused(6, *_protect(program, program.directory / "missing"))
    assert str(program.directory / "missing") in message


def test_not_a_cluster_exits_6(program: Program) -> None:
    (program.directory / "plain").mkdir()
    message, hint = program.refused(6, *_protect(program, program.directory / "plain"))
    assert "is not a data directory" in message
    assert "PG_VERSION" in hint


def test_store_that_is_none_exits_6(program: Program) -> None:
    (program.directory / "empty").mkdir()
    message, _ = program.refused(6, "info", "--store", str(program.directory / "empty"))
    assert str(program.directory / "empty") in message


def test_not_root_exits_6(program: Program) -> None:
    message, hint = program.refused(6, *_protect(program, program.directory / "missing"), user=UNPRIVILEGED)
    assert "root" in message
    assert "root" in hint or "sudo" in hint


# --- a set whose engine does not run, or does not answer


def _configure(program: Program) -> config.Config:
    """Settings of a set "main" that was never attached."""
    settings = config.Config(
        name="main",
        set_id=secrets.token_hex(16),
        pgdata=program.directory / "data",
        store=program.directory / "store",
        journal=program.directory / "journal",
        volumes=(
            config.VolumeConfig(
                "data", program.directory / "data.img", False, "ext4", program.directory / "data", 1 << 30
            ),
        ),
        cluster=config.ClusterConfig(
            15,
            Path("/usr/lib/postgresql/15/bin"),
            "postgres",
            5432,
            "",
            ("/usr/lib/postgresql/15/bin/postgres",),
            program.directory / "log",
            "1",
            True,
        ),
        root=program.root,
    )
    config.save_config(settings)
    return settings


@pytest.mark.parametrize("words", [["mark", "here"], ["cut"], ["show", "1"], ["info"]])
def test_set_that_is_not_up_exits_6(program: Program, words: list[str]) -> None:
    _configure(program)
    program.refused(6, *words)


def test_damaged_settings_name_the_file_and_exit_2(program: Program) -> None:
    file = _configure(program).paths.config_file
    file.write_text(file.read_text().replace('fs = "ext4"', 'fs = "ntfs"', 1))
    message, hint = program.refused(2, "status", "main")
    assert str(file) in message
    assert "ext4" in hint


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_interrupted_command_says_so(program: Program, number: int, code: int) -> None:
    """The signal comes while a command waits for an engine that does not answer."""
    paths = _configure(program).paths
    paths.run.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(paths.control))
        door.listen()
        door.settimeout(30)
        command = [sys.executable, "-P", "-m", "pgcdp", "mark", "here"]
        process = subprocess.Popen(command, env=program.environment, stderr=subprocess.PIPE, text=True)
        with process, door.accept()[0]:
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said.strip() == "interrupted"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_signal_that_python_drops_comes_again(program: Program, number: int, code: int) -> None:
    """Inside of a weak reference's callback, as those of an import: the command went on, deaf to any other."""
    stuck = f"""
import os, signal, sys, time, weakref
from pgcdp.cli import main, options
class Thing:
    pass
def here(_):
    os.kill(os.getpid(), {int(number)})
    time.sleep(0.01)
def wait(name):
    thing = Thing()
    known = weakref.ref(thing, here)
    del thing
    time.sleep(60)
options.pick_set = wait
sys.argv[1:] = ["status"]
sys.exit(main.main())
"""
    command = [sys.executable, "-P", "-c", stuck]
    done = subprocess.run(command, env=program.environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip() == "interrupted"


# --- 1: what nobody foresaw


def test_bug_is_told_with_its_place_in_the_log(program: Program) -> None:
    """A program that was broken on purpose: one of its functions is gone."""
    broken = "import sys; from pgcdp.cli import main, options; del options.pick_set; sys.exit(main.main(['status']))"

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", broken]
        return subprocess.run(command, capture_output=True, text=True, env=program.environment, check=False)

    done = run()
    assert done.returncode == 1
    assert done.stderr.startswith("error: unexpected AttributeError: ")
    assert "hint: please report this" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in (program.root / "var/lib/pgcdp/pgcdp.log").read_text()
    program.environment["PGCDP_DEBUG"] = "1"
    assert "Traceback" in run().stderr
