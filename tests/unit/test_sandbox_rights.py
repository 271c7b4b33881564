"""A sandbox gives nobody more than production does: rules of pg_hba, owners of files, links that its user has put."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgcdp import proc
from pgcdp.errors import PreconditionError
from pgcdp.proc import User
from pgcdp.recovery import isolate, sandbox
from pgcdp.recovery.sandbox_settings import hba_lines

LOOPBACK = ["127.0.0.1", "255.255.255.255"]


def lines(*rules: list[Any]) -> list[str]:
    return hba_lines({"hba": list(rules)}, trust=False)


def test_a_rule_is_taken_over_with_its_names_quoted() -> None:
    assert lines(["host", ["all"], ["+staff", 'a"b c,d'], *LOOPBACK, "md5"]) == [
        'host all +staff,"a""b c,d" 127.0.0.1 255.255.255.255 md5'
    ]
    assert lines(["host", ["@x", "sameuser"], ["all"], "samehost", None, "scram-sha-256"]) == [
        'host "@x",sameuser all samehost scram-sha-256'
    ]


@pytest.mark.parametrize("kind", ["hostssl", "hostgssenc"])
def test_trust_that_a_certificate_may_have_earned_is_none(kind: str) -> None:
    """`hostssl ... trust clientcert=verify-full` lets nobody in who has no certificate; a clone cannot ask for it."""
    assert lines([kind, ["all"], ["all"], "all", None, "trust"]) == ["host all all all reject"]
    assert lines([kind, ["all"], ["all"], "all", None, "md5"]) == ["host all all all md5"]
    assert lines(["host", ["all"], ["all"], "all", None, "trust"]) == ["host all all all trust"]


def test_who_asks_outside_refuses_and_unknown_rules_ask_for_passwords() -> None:
    assert lines(["host", ["all"], ["all"], *LOOPBACK, "ldap"])[0].endswith(" reject")
    assert lines() == []
    for unknown in (None, {}, {"hba": None}):
        assert hba_lines(unknown, trust=False) == ["host all all 127.0.0.1/32 scram-sha-256"]


def test_no_name_is_given_away_below_a_directory_that_is_the_users_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its user could have put a link to any file in place of the inner one."""
    given: list[Path] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid, follow_symlinks: given.append(path))
    scratch, sockets = sandbox._make_scratch(tmp_path, User("nobody", 65534, 65534, ()), "postgres")
    assert given.index(sockets) < given.index(scratch)


def test_no_log_is_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("as it was\n")
    for target in (precious, tmp_path / "missing"):
        log = tmp_path / "postgres.log"
        log.symlink_to(target)
        with pytest.raises(PreconditionError, match="cannot write the log"):
            proc.spawn(["/bin/echo", "more"], output=log)
        log.unlink()
    assert precious.read_text() == "as it was\n"
    assert not (tmp_path / "missing").exists()


def has_scopes() -> bool:
    words = [ctypes.c_long(isolate.SYS_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1)]
    return int(ctypes.CDLL(None).syscall(*words)) >= isolate.LANDLOCK_HAS_SCOPES


@pytest.mark.skipif(not has_scopes(), reason="Landlock of this kernel has no scopes")
def test_another_process_of_the_same_user_is_no_way_out(tmp_path: Path) -> None:
    """Production runs as that user: /proc/PID/root is its world, and a signal would end it."""
    other = subprocess.Popen(["/bin/sleep", "60"], user=65534, group=65534, extra_groups=[])
    try:
        order = {"keep": [str(tmp_path)], "hide": [], "uid": 65534, "gid": 65534, "groups": []}
        tries = f"""
            ls -d /proc/{other.pid}/root/ && echo saw
            ls -d /proc/{other.pid}/cwd/ && echo saw
            kill {other.pid} && echo killed
            sleep 60 & kill $! && echo own
        """
        words = [sys.executable, "-I", isolate.__file__, json.dumps(order), "/bin/sh", "-c", tries]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.stdout.split() == ["own"], done.stdout + done.stderr
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
