"""A set whose store is encrypted, from end to end: production as ever, and of a copy nothing without the key."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

from pgcdp import api
from pgcdp.fsio import read_json
from pgcdp.postgres.cluster import Binaries
from tests.cluster.test_store_alone import clean_machine, pgcdp, started
from tests.fix_keys import MakeKey, plain_files
from tests.fix_sets import MakeSet
from tests.waiting import wait_until

SECRET = "a row that nobody may read 7f3a91c2"


@pytest.mark.timeout(600)
def test_a_copy_is_worth_nothing_without_the_key(
    make_set: MakeSet, pg15: Binaries, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGCDP_ENCRYPT_KEY_FILE", raising=False)
    key, wrong = make_key().file, make_key().file
    assert key is not None
    assert wrong is not None
    found = make_set(pg15, encrypt_key_file=key)
    found.sql("create table secret_name as select n as id, '' as what from generate_series(1, 100) n")
    found.sql(f"update secret_name set what = '{SECRET}'")
    api.mark(found.name, "secret_mark")
    last = api.cut(found.name)
    assert found.verify(last["to_write"])["ok"]
    assert plain_files(found.store) == []
    for file in (path for path in found.store.rglob("*") if path.is_file()):
        with suppress(FileNotFoundError):  # the agent goes on meanwhile
            content = file.read_bytes()
            assert not [word for word in (SECRET, "secret_name", "secret_mark") if word.encode() in content], file
    copy, place = found.root / "copy", found.root / "restored"
    with clean_machine(found, copy):
        alone = ["--store", str(copy)]
        for words in (["info"], ["verify"], ["restore", "--to-directory", str(place)], ["check", "--full"]):
            said = pgcdp(*words, *alone, code=6)["error"]
            assert said["message"] == f"the store {copy} is encrypted, and no key is given"
            assert "--encrypt-key-file FILE" in said["hint"]
        said = pgcdp("restore", *alone, "--to-directory", str(place), "--encrypt-key-file", str(wrong), code=6)["error"]
        assert f"the key file {wrong} is not that of the store {copy}" in said["message"]
        assert not place.exists()
        opened = [*alone, "--encrypt-key-file", str(key)]
        assert pgcdp("verify", *opened)["ok"]
        assert pgcdp("check", *opened, "--full")["ok"]
        assert pgcdp("log", *opened, "--table", "secret_name")["transactions"]
        pgcdp("restore", *alone, "--encrypt-key-command", f"cat {key}", "--to-directory", str(place))
        with started(found, place) as session:
            rows = session.execute("select count(*) from secret_name where what = %s", [SECRET]).fetchone()
            assert rows == (100,)
    api.up(found.name)
    key.rename(key.with_name("gone"))
    before = {path: path.stat().st_mtime_ns for path in found.store.glob("history/*")}
    said = pgcdp("verify", found.name, code=6)["error"]
    assert f"the key file {key} cannot be read" in said["message"]
    assert {path: path.stat().st_mtime_ns for path in found.store.glob("history/*")} == before
    failing = {each["name"]: each["detail"] for each in pgcdp("check", found.name, code=6)["checks"] if not each["ok"]}
    failing.pop("agent", None)  # it may have tried by now, too
    assert list(failing) == ["store"], "it is told once"
    assert f"the key file {key} cannot be read" in failing["store"]
    found.allowed.append("ERROR agent: the key file .* cannot be read")
    api.down(found.name)
    api.up(found.name)  # a key that is away does not keep production down
    found.sql("insert into secret_name values (101, 'written without the key')")
    wait_until(
        lambda: f"{key} cannot be read" in str(api.status(found.name)["agent"]["error"]), what="the agent's error"
    )
    key.with_name("gone").rename(key)
    wait_until(lambda: not api.status(found.name)["agent"]["error"], what="the end of the error")
    last = api.cut(found.name)
    assert pgcdp("verify", found.name)["ok"]
    assert read_json(found.store / "store.json")["encrypted"] is True
    assert os.stat(found.store / "encryption.json").st_mode & 0o077 == 0
