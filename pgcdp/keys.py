"""The user's key of an encrypted store: where it comes from, and which stores this process has opened with it.

The store's data key is random and never changes; it lies in the store, wrapped by the user's (`wrapped`). Neither key
is ever an argument, in the environment, or on a disk: the engine gets the data key through a pipe.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pgcdp import proc, sealing, wrapped
from pgcdp.errors import DamageError, PreconditionError, UsageError

FILE_VARIABLE, COMMAND_VARIABLE = "PGCDP_ENCRYPT_KEY_FILE", "PGCDP_ENCRYPT_KEY_COMMAND"
COMMAND_SECONDS = 60.0
"""How long a command may take to print the key."""
LEFT_OPEN_SECONDS = 5.0
"""How much longer what the command left behind in a session of its own may hold the pipe."""
MAKE_ONE = "a key is 64 hex digits, such as openssl rand -hex 32 prints"
_TIMED_OUT, _KILLED = 124, 137
"""Exit codes of timeout(1)."""
_KEY = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where the user's key is: a file, or a command of the shell that prints it."""

    file: Path | None = None
    command: str | None = None

    def __str__(self) -> str:
        return f"the key file {self.file}" if self.file is not None else f'the key command "{self.command}"'

    def read(self, timeout: float = COMMAND_SECONDS) -> bytes:
        """The key, 32 bytes. Raises PreconditionError that names the file or command, never with a part of the key."""
        text = self._of_file(self.file) if self.file is not None else self._of_command(timeout)
        found = text.strip()
        if not _KEY.fullmatch(found):
            raise PreconditionError(f"{self} gives {len(found)} characters that are no key", MAKE_ONE)
        return bytes.fromhex(found)

    def _of_file(self, file: Path) -> str:
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer gives nothing
        except OSError as error:
            raise PreconditionError(
                f"{self} cannot be read: {error.strerror}",
                "bring it back, or name where it is with --encrypt-key-file or the setting encrypt_key_file",
            ) from None
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o077:
                raise PreconditionError(
                    f"{self} may be read by others than its owner (mode {found.st_mode & 0o777:04o})",
                    f"chmod 600 {file}",
                )
            if found.st_uid not in (0, os.geteuid()):
                raise PreconditionError(f"{self} belongs to user {found.st_uid}", f"chown root {file}")
            return os.read(fd, 4096).decode("ascii", "replace")
        except OSError as error:
            raise PreconditionError(f"{self} cannot be read: {error.strerror}", "name a file") from None
        finally:
            os.close(fd)

    def _of_command(self, timeout: float) -> str:
        # What the shell has started is ended with it: timeout(1) gives them a process group of their own.
        words = ["timeout", "--kill-after=2", f"{timeout:g}", "/bin/sh", "-c", self.command or ""]
        try:
            done = proc.run(words, check=False, timeout=timeout + LEFT_OPEN_SECONDS)
        except proc.ProcessFailed:
            raise PreconditionError(
                f"{self} ended, and something that it started still holds the pipe for the key", "let it end, too"
            ) from None
        if done.returncode in (_TIMED_OUT, _KILLED):
            raise PreconditionError(
                f"{self} did not end in {timeout:g} s and was killed",
                "run it by hand; it must print the key and ask nothing",
            )
        if done.returncode:
            said = " | ".join(line.strip() for line in done.stderr.splitlines()[-2:] if line.strip())
            raise PreconditionError(
                f"{self} failed with exit code {done.returncode}" + (f": {said}" if said else ""),
                "run it by hand to see why",
            )
        return done.stdout


# --- which source a store's key has

_known: dict[Path, KeySource | None] = {}
_given: KeySource | None = None
_opened: dict[Path, tuple[KeySource, object]] = {}
"""Of stores that are open: by whose key, and what that unwrapped."""


def source(file: Path | None, command: str | None) -> KeySource | None:
    """Of a file, or of a command; None of neither. Raises UsageError for both."""
    if file is not None and command:
        raise UsageError("both a key file and a key command are given for the store", "give one of them")
    return KeySource(file) if file is not None else KeySource(None, command) if command else None


def know(store: Path, found: KeySource | None) -> None:
    """What a set's settings say of its store."""
    _known[store] = found


def give(found: KeySource | None) -> None:
    """What the command line says: it goes before settings and environment."""
    global _given
    _given = found


def source_of(store: Path, env: Mapping[str, str] | None = None) -> KeySource | None:
    """Where the key of a store is: as the command line says, else the settings of its set, else the environment."""
    if _given is not None:
        return _given
    if store in _known:  # what the environment says is not what the agent of a set is started with
        return _known[store]
    names = os.environ if env is None else env
    file = names.get(FILE_VARIABLE)
    return source(Path(os.path.abspath(file)) if file else None, names.get(COMMAND_VARIABLE))


# --- opening with it


def user_key_for(store: Path) -> bytes | None:
    """The key that a new store is to be encrypted with; None: it is to be plain. Nothing is written.

    Raises PreconditionError for a key that cannot be read, or that would lie in the store itself.
    """
    found = source_of(store)
    if found is None:
        return None
    refuse_inside(store, found)
    return found.read()


def begin(store: Path, set_id: bytes, user_key: bytes | None) -> None:
    """Give a new, empty store a data key of its own, durably, and open it: what is written there is sealed from now on.

    Without a key it is plain.
    """
    sealing.forget(store)
    _opened.pop(store, None)
    if user_key is None:
        return
    data_key, content = wrapped.write(store, set_id, user_key)
    sealing.unlock(store, data_key)
    found = source_of(store)
    if found is not None:
        _opened[store] = (found, content["wrapped"])


def open_store(store: Path, set_id: bytes, encrypted: bool) -> None:
    """Make the key of a store known to this process, or that it is plain. Nothing is written.

    Raises PreconditionError for a key that is missing or wrong, or that command line or settings give for a plain
    store; DamageError.
    """
    if not encrypted:
        sealing.forget(store)
        found = _given or _known.get(store)  # what the environment says may be for another store
        if found is not None:
            raise PreconditionError(
                f"the store {store} is not encrypted, but {found} is given for it",
                "leave the key out; a store is encrypted from its beginning or never, so protect with another --store",
            )
        return
    found = source_of(store)
    whole = wrapped.read(store)
    if (
        found is not None
        and any(_opened.get(store) == (found, content["wrapped"]) for _, content in whole)
        and sealing.data_key_of(store) is not None
    ):
        return  # a command that prints the key is not run each time
    if found is None:
        raise PreconditionError(
            f"the store {store} is encrypted, and no key is given",
            f"give --encrypt-key-file FILE or --encrypt-key-command CMD, or set {FILE_VARIABLE} or {COMMAND_VARIABLE}",
        )
    user_key = found.read()
    damage: DamageError | None = None
    for file, content in whole:
        try:
            data_key = wrapped.data_key_in(file, content, user_key, set_id)
        except DamageError as error:
            damage = damage or error
            continue
        if data_key is not None:
            sealing.unlock(store, data_key)
            _opened[store] = (found, content["wrapped"])
            return
    if damage is not None:
        raise damage
    raise PreconditionError(
        f"{found} is not that of the store {store}: another key was used when it was made",
        "name the right one with --encrypt-key-file or --encrypt-key-command, or in the set's settings; "
        f"if this is the right one, {whole[0][0]} is another store's: bring its own back",
    )


def damaged_copies(store: Path) -> Iterator[tuple[Path, str, Path | None]]:
    """Of an open encrypted store, as `wrapped.damaged`."""
    return wrapped.damaged(store, _opened[store][1] if store in _opened else None)


def mend_copies(store: Path) -> list[Path]:
    """Of an open encrypted store, as `wrapped.mend`."""
    return wrapped.mend(store, _opened[store][1] if store in _opened else None)


def refuse_inside(store: Path, found: KeySource) -> None:
    """Raises PreconditionError for a key that would lie in the store that it opens."""
    if _lies_in(found, store):
        raise PreconditionError(
            f"{found} lies in the store {store}: whoever has the one has the other", "keep it on another disk"
        )


def refuse_captured(found: KeySource | None, places: Iterable[Path]) -> None:
    """Raises PreconditionError for a key that lies in one of the directories of the set, which the store holds."""
    for place in places:
        if found is not None and _lies_in(found, place):
            raise PreconditionError(
                f"{found} lies in {place}, which is captured: it would be locked into the store that it opens",
                "move it to a disk that is not of the set, and name it there (encrypt_key_file)",
            )


def _lies_in(found: KeySource, place: Path) -> bool:
    return found.file is not None and Path(os.path.realpath(found.file)).is_relative_to(os.path.realpath(place))
