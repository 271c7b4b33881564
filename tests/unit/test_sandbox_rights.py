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
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcdp import proc
from pgcdp.errors import PreconditionError
from pgcdp.proc import User
from pgcdp.recovery import isolate, sandbox
from pgcdp.recovery.sandbox_settings import hba_lines

LOOPBACK = ["127.0.0.1", "255.255.255.255"]
ALL = [["all"], ["all"]]


def lines(*rules: list[Any], ssl: str = "on") -> list[str]:
    return hba_lines({"hba": list(rules), "settings": [{"name": "ssl", "setting": ssl}]}, trust=False)


def test_a_rule_is_taken_over_with_its_names_quoted() -> None:
    assert lines(["host", ["all"], ["+staff", 'a"b c,d'], *LOOPBACK, "md5"]) == [
        'host all +staff,"a""b c,d" 127.0.0.1 255.255.255.255 md5'
    ]
    assert lines(["host", ["@x", "sameuser"], ["all"], "samehost", None, "scram-sha-256"]) == [
        'host "@x",sameuser all samehost scram-sha-256'
    ]


def test_trust_that_a_certificate_or_a_ticket_may_have_earned_is_none() -> None:
    """`hostssl ... trust clientcert=verify-full` lets nobody in who has no certificate; a clone cannot ask for it."""
    assert lines(["hostssl", *ALL, "all", None, "trust"], ["host", ["a"], ["all"], "all", None, "md5"]) == [
        'host "a" all all md5'
    ]
    assert lines(["hostssl", ["a"], ["all"], "all", None, "trust"]) == ['host "a" all all reject']
    assert lines(["hostssl", *ALL, "all", None, "md5"]) == ["host all all all md5"]
    assert lines(["host", *ALL, "all", None, "trust"]) == ["host all all all trust"]
    for method in ("trust", "md5"):
        assert lines(["hostgssenc", *ALL, "all", None, method]) == []


ANYWHERE = ["0.0.0.0", "0.0.0.0"]


def test_who_must_encrypt_in_production_is_let_in_by_the_same_password() -> None:
    """`hostnossl ... reject` in front of `hostssl ...` refuses nobody but who does not encrypt."""
    rules = [["hostnossl", *ALL, *ANYWHERE, "reject"], ["hostssl", *ALL, *ANYWHERE, "scram-sha-256"]]
    assert lines(*rules) == ["host all all 0.0.0.0 0.0.0.0 scram-sha-256"]
    assert lines(*rules, ssl="off") == ["host all all 0.0.0.0 0.0.0.0 reject"]


@pytest.mark.parametrize(
    ("rules", "let_in"),
    [
        # the way that is closed for all is closed for what follows, too
        ([["hostnossl", *ALL, "all", None, "reject"], ["hostnossl", *ALL, "all", None, "md5"]], []),
        ([["hostssl", *ALL, "all", None, "cert"], ["hostssl", *ALL, "all", None, "md5"]], []),
        # one that asks for a certificate closes its own only
        ([["hostssl", *ALL, "all", None, "cert"], ["hostnossl", *ALL, *LOOPBACK, "md5"]], ["md5"]),
        ([["hostssl", *ALL, "all", None, "reject"], ["host", *ALL, *LOOPBACK, "md5"]], ["md5"]),
        # both are closed
        ([["host", *ALL, "all", None, "reject"], ["hostssl", *ALL, "all", None, "md5"]], ["reject", "md5"]),
        (
            [
                ["hostnossl", *ALL, "all", None, "reject"],
                ["hostssl", *ALL, "all", None, "reject"],
                ["host", *ALL, "all", None, "md5"],
            ],
            ["reject", "md5"],
        ),
        # refused are some only: who they are is not told by the other way, so they stay refused
        (
            [["hostnossl", ["all"], ["a"], "all", None, "reject"], ["hostssl", *ALL, "all", None, "md5"]],
            ["reject", "md5"],
        ),
        ([["hostnossl", *ALL, "samehost", None, "reject"], ["hostssl", *ALL, "all", None, "md5"]], ["reject", "md5"]),
        # a rule for others closes nothing
        ([["hostnossl", *ALL, "10.0.0.0", "255.0.0.0", "reject"], ["hostnossl", *ALL, *LOOPBACK, "md5"]], ["md5"]),
        ([["hostnossl", *ALL, "::1", "ffff::", "reject"], ["hostnossl", *ALL, *LOOPBACK, "md5"]], ["md5"]),
        ([["host", *ALL, "127.0.0.0", "255.0.0.0", "md5"]], ["md5"]),
    ],
)
def test_a_rule_for_one_way_in_is_no_rule_for_the_other(rules: list[list[Any]], let_in: list[str]) -> None:
    assert [line.split()[-1] for line in lines(*rules)] == let_in


def first_match(rules: list[list[Any]], ways: set[str], user: str) -> str:
    """The method of the first rule for a user from 127.0.0.1 who comes in one of these ways."""
    for kind, _, users, address, _, method in rules:
        if kind in ways and users[0] in ("all", user) and address != "10.0.0.0":
            return str(method)
    return "reject"


RULE = st.builds(
    lambda kind, user, where, method: [kind, ["all"], [user], *where, method],
    st.sampled_from(["host", "hostssl", "hostnossl", "hostgssenc", "hostnogssenc"]),
    st.sampled_from(["all", "a"]),
    st.sampled_from([("all", None), ("127.0.0.0", "255.0.0.0"), ("10.0.0.0", "255.0.0.0")]),
    st.sampled_from(["md5", "scram-sha-256", "trust", "reject", "cert"]),
)


@settings(max_examples=2000)
@given(st.lists(RULE, max_size=6), st.booleans())
def test_nobody_is_let_in_whom_production_would_not(rules: list[list[Any]], ssl: bool) -> None:
    made = [line.replace('"', "").split() for line in lines(*rules, ssl="on" if ssl else "off")]
    ways = [{"host", "hostnossl", "hostnogssenc"}, *([{"host", "hostssl", "hostnogssenc"}] if ssl else [])]
    for user in ("a", "b"):
        method = next((line[-1] for line in made if line[2] in ("all", user)), "reject")
        assert method == "reject" or method in [first_match(rules, way, user) for way in ways], made


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
        order = {"keep": [str(tmp_path)], "bind": [], "hide": [], "uid": 65534, "gid": 65534, "groups": []}
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


def test_a_socket_that_is_gone_keeps_no_sandbox_from_its_start(tmp_path: Path) -> None:
    """Its server has ended since it was listed; a link that leads nowhere stands for it."""
    (tmp_path / ".s.PGSQL.5432").symlink_to(tmp_path / "gone")
    isolate._hide(str(tmp_path), [], [str(tmp_path / "needed")])
