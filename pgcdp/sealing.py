"""What of an encrypted store is ciphertext, and how (FORMAT.md 7): AES-256-GCM under keys of the store's data key.

Whoever opens an encrypted store makes its directory known here (`unlock`); from then on each file that is written below
it is sealed, and each that is read there must be. It goes by the path, since all that a store holds is to be covered
by one rule: what is forgotten somewhere is refused when it is read, not found as plain text by somebody else.

A nonce is 96 random bits and never counted: a file that is taken up again after a kill writes other bytes at the same
place. So that one key is never used so often that two of them could be equal, each frames file and each 64 MiB of the
image has a key of its own.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pgcdp.errors import DamageError, PreconditionError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
OVERHEAD = NONCE_BYTES + TAG_BYTES
"""Bytes that a sealed piece is longer than what it holds."""
PIECE_BLOCKS = 1 << 14
"""Blocks of the image that have one key: 64 MiB."""
CLEAR = ("store.json", "store-copy.json", "owner.json", "encryption.json", "encryption-copy.json", "reserve")
"""Files at the top of a store that whoever has no key may read: whose it is, what the key must fit, and nothing."""

_FILE = struct.Struct("<8sII12sI")
_MAGIC = b"PGCDPSEA"
_VERSION = 1
_HINT = "pgcdp check --full tells what else is damaged and what can still be restored"


class Cipher(Protocol):
    """An AEAD under one key."""

    def encrypt(self, nonce: bytes, data: bytes | bytearray | memoryview, associated_data: bytes, /) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes, /) -> bytes: ...


def cipher(key: bytes) -> Cipher:
    """AES-256-GCM under `key`, 32 bytes."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # ten megabytes that a plain store never reads

    return AESGCM(key)


def derive(key: bytes, what: bytes) -> bytes:
    """A key for one purpose, 32 bytes: HKDF-Expand of RFC 5869 with SHA-256, of a key that is random."""
    return hmac.digest(key, what + b"\x01", "sha256")


class Sealer:
    """Seals and unseals with the keys that a store's data key gives. Any thread."""

    def __init__(self, data_key: bytes) -> None:
        self.data_key = data_key
        self._files = cipher(derive(data_key, b"pgcdp file"))
        self.piece: Callable[[int, int], Cipher] = lru_cache(maxsize=4096)(self._piece)

    def frames(self, header: bytes) -> Cipher:
        """For the frames of one frames file. `header`: bytes 8 to 56 of the file, its salt among them."""
        return cipher(derive(self.data_key, b"pgcdp frames" + header))

    def _piece(self, volume: int, piece: int) -> Cipher:
        """For PIECE_BLOCKS blocks of the image of a volume."""
        return cipher(derive(self.data_key, b"pgcdp image" + struct.pack("<HI", volume, piece)))

    def seal_file(self, place: str, content: bytes) -> bytes:
        """The bytes of a sealed file. `place`: names of its directory and of itself; it reads back only there."""
        head = _FILE.pack(_MAGIC, _VERSION, 0, os.urandom(NONCE_BYTES), 0)
        return head + self._files.encrypt(head[16:28], content, head[:16] + place.encode("utf-8", "surrogateescape"))

    def open_file(self, path: Path, raw: bytes) -> bytes:
        """What a sealed file holds. Raises DamageError."""
        if len(raw) < _FILE.size + TAG_BYTES or raw[:8] != _MAGIC:
            raise DamageError(f"{path} is not encrypted as its store is (offset 0)", _HINT)
        if raw[:16] != _FILE.pack(_MAGIC, _VERSION, 0, bytes(NONCE_BYTES), 0)[:16] or raw[28:32] != bytes(4):
            raise DamageError(f"{path} has a wrong header at offset 0", _HINT)
        bound_to = raw[:16] + place_of(path).encode("utf-8", "surrogateescape")
        content = decrypted(self._files, raw[16:28], raw[32:], bound_to)
        if content is None:
            raise DamageError(f"{path} is not what was encrypted (offset {_FILE.size})", _HINT)
        return content


def place_of(path: Path) -> str:
    """What binds a sealed file to its place: it keeps this when an interval is published or joined by rename, and when
    the store is copied to another directory."""
    directory = Path(os.path.abspath(path.parent))
    return path.name if directory in _unlocked else f"{directory.name}/{path.name}"


def seal(by: Cipher, content: bytes | bytearray | memoryview, bound_to: bytes) -> bytes:
    """Nonce, ciphertext, tag."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + by.encrypt(nonce, content, bound_to)


def unseal(by: Cipher, sealed: bytes, bound_to: bytes) -> bytes | None:
    """What was sealed; None when it is not what was sealed, or not for this place."""
    if len(sealed) < OVERHEAD:
        return None
    return decrypted(by, sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], bound_to)


def decrypted(by: Cipher, nonce: bytes, ciphertext: bytes, bound_to: bytes) -> bytes | None:
    """What was encrypted; None when the tag at the end of `ciphertext` says that it is something else."""
    from cryptography.exceptions import InvalidTag

    try:
        return by.decrypt(nonce, ciphertext, bound_to)
    except InvalidTag:
        return None


# --- which stores this process has the key of

_unlocked: dict[Path, Sealer] = {}


def unlock(store: Path, data_key: bytes) -> None:
    """From now on this process reads and writes what lies below `store` with its data key."""
    for path in _names(store):
        known = _unlocked.get(path)
        if known is None or known.data_key != data_key:
            _unlocked[path] = Sealer(data_key)


def forget(store: Path) -> None:
    """The key of a store is not known any more: it is plain, or another one is there by now."""
    for path in _names(store):
        _unlocked.pop(path, None)


def _names(store: Path) -> Iterator[Path]:
    yield Path(os.path.abspath(store))
    yield Path(os.path.realpath(store))


def sealer_of(path: Path) -> Sealer | None:
    """What seals a file at this place; None for what lies in no encrypted store, and for what is clear there."""
    if not _unlocked:
        return None
    whole = Path(os.path.abspath(path))
    for parent in whole.parents:
        found = _unlocked.get(parent)
        if found is not None:
            return None if whole.parent == parent and whole.name in CLEAR else found
    return None


def data_key_of(store: Path) -> bytes | None:
    """The data key of a store, for an engine that reads it; None: it is plain."""
    found = _unlocked.get(Path(os.path.abspath(store)))
    return found.data_key if found else None


def sealed(path: Path, content: bytes) -> bytes:
    """The bytes with which a file at this place is written."""
    sealer = sealer_of(path)
    return content if sealer is None else sealer.seal_file(place_of(path), content)


def unsealed(path: Path, raw: bytes) -> bytes:
    """What a file at this place holds, by the bytes that it has. DamageError; PreconditionError without a key."""
    sealer = sealer_of(path)
    if sealer is not None:
        return sealer.open_file(path, raw)
    if raw[:8] == _MAGIC:
        raise no_key(path)
    return raw


def no_key(path: Path) -> PreconditionError:
    """The error for an encrypted file below a directory that nobody opened as a store."""
    return PreconditionError(
        f"{path} is encrypted, and its store was not opened with a key", "name the store with --store"
    )
