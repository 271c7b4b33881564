"""The key of an encrypted store: what opens it and what does not, and the data key that lies in it twice."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from pgcdp import keys, sealing, twice, wrapped
from pgcdp.checking.opened import Opened
from pgcdp.errors import DamageError, PreconditionError
from pgcdp.fsio import read_json, write_json
from pgcdp.keys import KeySource
from pgcdp.store.layout import Store
from pgcdp.store.rebuild import rebuild
from pgcdp.store.scrub import check_store
from tests.fix_keys import MakeKey, new_key, opened_with
from tests.small_store import SET_ID, flip, make_store
from tests.unit.test_store_alone import state_of


def test_only_the_key_opens_it_and_nothing_is_written(
    tmp_path: Path, key: KeySource, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    monkeypatch.delenv(keys.FILE_VARIABLE)
    before = state_of(store.path)
    wrong, short = make_key(), make_key()
    assert wrong.file is not None
    assert short.file is not None
    assert key.file is not None
    short.file.write_text(key.file.read_text()[:63])
    cases: list[tuple[KeySource | None, str]] = [
        (None, f"the store {store.path} is encrypted, and no key is given"),
        (wrong, f"the key file {wrong.file} is not that of the store {store.path}: another key was used"),
        (short, f"the key file {short.file} gives 63 characters that are no key"),
        (KeySource(tmp_path / "none"), "cannot be read: No such file or directory"),
        (KeySource(None, "echo no luck >&2; exit 7"), 'the key command "echo.*failed with exit code 7: no luck'),
        (KeySource(None, "true"), 'the key command "true" gives 0 characters that are no key'),
    ]
    for found, said in cases:
        with pytest.raises(PreconditionError, match=said) as caught:
            opened_with(store.path, found)
        assert caught.value.hint
        with pytest.raises(PreconditionError, match="its store was not opened with a key"):
            read_json(store.image / "state.json")
    assert opened_with(store.path, KeySource(None, f"cat {key.file}")) == store
    assert opened_with(store.path, key) == store
    assert state_of(store.path) == before


def test_a_key_that_others_may_read_is_refused(tmp_path: Path, make_key: MakeKey) -> None:
    found = make_key()
    assert found.file is not None
    assert len(found.read()) == 32
    for mode in (0o640, 0o604, 0o660):
        found.file.chmod(mode)
        with pytest.raises(PreconditionError, match=rf"may be read by others than its owner \(mode {mode:04o}\)"):
            found.read()
    found.file.chmod(0o400)
    os.chown(found.file, 4711, 0)
    with pytest.raises(PreconditionError, match="belongs to user 4711"):
        found.read()


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match=r'"sleep 600" did not end in 0\.3 s and was killed'):
        KeySource(None, "sleep 600").read(timeout=0.3)


def test_a_command_that_leaves_something_behind_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "LEFT_OPEN_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(PreconditionError, match="something that it started still holds the pipe"):
        KeySource(command="setsid sleep 8 & echo key").read(timeout=2)  # which the shell itself must not need
    assert time.monotonic() - began < 7


def test_a_pipe_that_nobody_writes_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(PreconditionError, match="0 characters that are no key"):
        KeySource(pipe).read()


def test_a_key_in_the_store_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir()
    monkeypatch.setenv(keys.FILE_VARIABLE, str(new_key(tmp_path / "store" / "key").file))
    with pytest.raises(PreconditionError, match="lies in the store"):
        keys.user_key_for(tmp_path / "store")


def test_a_key_in_what_is_captured_is_refused(tmp_path: Path) -> None:
    """It would be locked into the store that it opens."""
    places = [tmp_path / "pgdata", tmp_path / "space"]
    for place in places:
        place.mkdir()
    inside = new_key(places[1] / "key")
    link = tmp_path / "link"
    link.symlink_to(places[1] / "key")
    for found in (inside, KeySource(link)):
        with pytest.raises(PreconditionError, match=f"lies in {places[1]}, which is captured") as caught:
            keys.refuse_captured(found, places)
        assert "encrypt_key_file" in str(caught.value.hint)
    for allowed in (new_key(tmp_path / "key"), KeySource(None, f"cat {inside.file}"), None):
        keys.refuse_captured(allowed, places)


def test_a_plain_store_takes_no_key_but_that_of_the_environment(
    tmp_path: Path, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(keys.FILE_VARIABLE, raising=False)
    store = make_store(tmp_path)
    with pytest.raises(PreconditionError, match=f"the store {store.path} is not encrypted, but the key file"):
        opened_with(store.path, make_key())
    assert opened_with(store.path, None) == store
    monkeypatch.setitem(keys._known, store.path, make_key())  # as the settings of its set say
    with pytest.raises(PreconditionError, match="is not encrypted, but the key file"):
        opened_with(store.path, None)
    monkeypatch.delitem(keys._known, store.path)
    monkeypatch.setenv(keys.FILE_VARIABLE, "/nothing/is/here")  # it is that of another store
    assert opened_with(store.path, None) == store
    monkeypatch.setenv(keys.COMMAND_VARIABLE, "exit 1")
    assert opened_with(store.path, None) == store


# --- what the data key lies in


def other_of(file: Path) -> Path:
    return next(file.with_name(name) for name in wrapped.FILES if name != file.name)


def spoilt(file: Path, how: str) -> str:
    """Damage a copy of the data key; what is said of it."""
    if how == "lost":
        file.unlink()
        return f"{file} is missing (offset 0), and the store is encrypted"
    if how == "flipped":
        flip(file, file.read_bytes().index(b"wrapped") + 20)
        return f"{file} has a wrong checksum at offset 0"
    if how == "torn":
        file.write_bytes(file.read_bytes()[:100])
        return f"{file} is no JSON at offset"
    content = read_json(file)
    if how == "foreign":  # whole, but of another store
        elsewhere = file.parents[1] / "elsewhere"
        elsewhere.mkdir()
        wrapped.write(elsewhere, SET_ID, bytes(32))
        (elsewhere / file.name).rename(file)
    else:
        write_json(file, {**content, "wrapped": flipped(str(content["wrapped"]))})
    return f"{file} does not hold the data key of this store (offset 0)"


@pytest.mark.parametrize("how", ["lost", "flipped", "torn", "foreign", "tampered"])
@pytest.mark.parametrize("name", wrapped.FILES)
def test_one_damaged_copy_of_the_data_key_costs_nothing(tmp_path: Path, key: KeySource, name: str, how: str) -> None:
    store = make_store(tmp_path)
    file = store.path / name
    before = file.read_bytes()
    said = spoilt(file, how)
    assert opened_with(store.path, key) == store
    found = check_store(store).damages
    assert [damage.file for damage in found] == [file]
    assert found[0].message.startswith(said)
    assert f"{other_of(file)} is whole: pgcdp rebuild s writes it again" in found[0].still
    assert found[0].lost is None
    catalog, damages = rebuild(store)
    catalog.close()
    assert damages == []
    assert file.read_bytes() == before
    assert check_store(store).ok


def test_damage_of_both_copies_of_the_data_key_is_damage_and_no_wrong_key(tmp_path: Path, key: KeySource) -> None:
    store = make_store(tmp_path)
    one, other = (store.path / name for name in wrapped.FILES)
    before = one.read_bytes()
    assert other.read_bytes() == before
    spoilt(one, "flipped")
    spoilt(other, "lost")
    assert [damage.file for damage in check_store(store).damages] == [one, other]
    assert all("as long as a copy of encryption.json" in damage.still for damage in check_store(store).damages)
    rebuild(store)[0].close()  # what is open goes on; nothing is written over what somebody may still mend
    assert not other.exists()
    with pytest.raises(DamageError, match=rf"{one} has a wrong checksum .* and {other} is missing") as caught:
        opened_with(store.path, key)
    assert "bring encryption.json or encryption-copy.json back" in str(caught.value.hint)
    for file in (one, other):
        file.write_bytes(before)
        spoilt(file, "tampered")
    with pytest.raises(DamageError, match=f"{one} does not hold what the key wrapped"):
        opened_with(store.path, key)
    one.write_bytes(before)
    other.unlink()
    assert opened_with(store.path, key) == store


def flipped(digits: str) -> str:
    return digits[:-1] + ("0" if digits[-1] != "0" else "1")


# --- going on


def test_why_a_store_does_not_open_is_found_out_once_in_a_check(
    tmp_path: Path, key: KeySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    sealing.forget(store.path)
    monkeypatch.delenv(keys.FILE_VARIABLE)
    count = tmp_path / "count"
    monkeypatch.setenv(keys.COMMAND_VARIABLE, f"echo asked >> {count}; exit 7")
    opened = Opened(store.path, SET_ID)
    assert opened.if_it_opens() is None
    for _ in range(2):
        with pytest.raises(PreconditionError, match="failed with exit code 7"):
            opened.store()
        assert opened.if_it_opens() is None
    assert count.read_text() == "asked\n"
    monkeypatch.setenv(keys.COMMAND_VARIABLE, f"cat {key.file}")
    assert opened.if_it_opens() is None
    assert Opened(store.path, SET_ID).if_it_opens() == store  # the next check


def test_a_killed_create_is_done_again_with_another_key(tmp_path: Path, key: KeySource) -> None:
    """Whatever it had written, the last thing store.json beside its place: nothing of it was ever complete."""
    (tmp_path / "a").mkdir()
    store = make_store(tmp_path / "a", 0)
    first = sealing.data_key_of(store.path)
    written = [name for file in (*wrapped.FILES, "store.json") for name in (f".{file}.new", file)][:-1]
    for count in range(len(written) + 1):
        fresh = tmp_path / f"b{count}"
        fresh.mkdir()
        for name in written[:count]:
            shutil.copy(store.path / (name if name in wrapped.FILES else "store.json"), fresh / name)
        again = Store.create(fresh, "s", SET_ID, list(store.volumes))
        assert again.encrypted
        assert sealing.data_key_of(fresh) not in (None, first)
        sealing.forget(fresh)
        assert Store.open(fresh) == again
        found = sorted(path.name for path in fresh.iterdir() if path.is_file())
        assert found == sorted([*wrapped.FILES, *twice.STORE.names])
    (fresh / twice.STORE.name).unlink()
    with pytest.raises(PreconditionError, match="is not an empty directory"):  # its copy is a store
        Store.create(fresh, "s", SET_ID, list(store.volumes))
    (fresh / twice.STORE.copy).unlink()
    (fresh / "somebody's").touch()
    with pytest.raises(PreconditionError, match="is not an empty directory"):
        Store.create(fresh, "s", SET_ID, list(store.volumes))
