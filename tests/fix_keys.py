"""Keys of encrypted stores. With PGCDP_TEST_ENCRYPT=1 every store that a test makes is encrypted, whatever it tests."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgcdp import keys, sealing
from pgcdp.keys import KeySource
from pgcdp.store.layout import Store

MakeKey = Callable[[], KeySource]
ENCRYPT_ALL = os.environ.get("PGCDP_TEST_ENCRYPT") == "1"


def new_key(file: Path) -> KeySource:
    """A key file as a user makes it."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w") as out:
        out.write(secrets.token_hex(32) + "\n")
    return KeySource(file)


@pytest.fixture
def make_key(tmp_path: Path) -> MakeKey:
    """Another key file each time."""
    return lambda: new_key(tmp_path / f"key-{secrets.token_hex(4)}")


@pytest.fixture
def key(make_key: MakeKey, monkeypatch: pytest.MonkeyPatch) -> KeySource:
    """What stores that are made in the test are encrypted with."""
    found = make_key()
    monkeypatch.setenv(keys.FILE_VARIABLE, str(found.file))
    return found


@pytest.fixture(scope="session", autouse=ENCRYPT_ALL)
def _encrypt_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key of all stores that are of no set comes from the environment; sets are given it by `fix_sets`."""
    file = new_key(tmp_path_factory.mktemp("keys") / "key").file
    assert file is not None
    os.environ[keys.FILE_VARIABLE] = str(file)
    yield
    del os.environ[keys.FILE_VARIABLE]


def plain_files(store: Path) -> list[str]:
    """Files of an encrypted store that are not ciphertext, by what they begin with; all that holds data must be."""
    found = []
    everything = [Path(place, name) for place, _, names in os.walk(store) for name in names]  # also as directories go
    for file in sorted(everything):
        name = str(file.relative_to(store))
        try:
            with file.open("rb") as content:
                head = content.read(64)
        except FileNotFoundError:  # the agent goes on meanwhile
            continue
        image = file.parent == store / "image" and file.suffix in (".img", ".sums")
        clear = (
            re.sub(r"^\.(.*)\.new$", r"\1", name) in sealing.CLEAR
            or file.name.endswith("lock")
            or file.parent == store / "image" / "views"
        )
        sealed = head[:8] == b"PGCDPSEA" or (head[:8] == b"PGCDPFRM" and head[8:12] == b"\x02\0\0\0")
        if not (image or clear or sealed):
            found.append(name)
    return found


def opened_with(path: Path, found: KeySource | None) -> Store:
    """A store that a process opens which knows nothing of it but this key."""
    sealing.forget(path)
    keys.give(found)
    try:
        return Store.open(path)
    finally:
        keys.give(None)
