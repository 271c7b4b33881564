"""`encryption.json` and its copy: a store's data key, wrapped by a key that is derived of the user's (FORMAT.md 7.1).

Nothing of the store can be read without it, so it is written twice: both files say the same, and one that is damaged or
lost costs nothing. What the user's key must give is noted beside the data key, so that a wrong key is told apart from
damage.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterator
from pathlib import Path

from pgcdp import fsio, sealing
from pgcdp.errors import DamageError, PgcdpError

FILES = ("encryption.json", "encryption-copy.json")
FORMAT = 1
BRING_BACK = (
    f"bring {FILES[0]} or {FILES[1]} back from a copy of the store: nothing of the store can be read without it"
)

Content = dict[str, object]


def write(store: Path, set_id: bytes, user_key: bytes) -> tuple[bytes, Content]:
    """Draw a data key and write it wrapped, twice, durably; returns it, and what the files say."""
    salt, data_key = os.urandom(16), os.urandom(sealing.KEY_BYTES)
    wrapping = _wrapping_key(user_key, salt, set_id)
    content: Content = {
        "format": FORMAT,
        "cipher": "AES-256-GCM",
        "salt": salt.hex(),
        "check": _check_of(wrapping),
        "wrapped": sealing.seal(sealing.cipher(wrapping), data_key, set_id).hex(),
    }
    for name in FILES:
        fsio.write_json(store / name, content)
    return data_key, content


def read(store: Path) -> list[tuple[Path, Content]]:
    """The whole ones of both files. Raises DamageError about both when there is none."""
    whole, damages = list[tuple[Path, Content]](), list[DamageError]()
    for name in FILES:
        try:
            whole.append((store / name, _read(store / name)))
        except DamageError as damage:
            damages.append(damage)
    if not whole:
        raise DamageError(" and ".join(damage.message for damage in damages), BRING_BACK)
    return whole


def data_key_in(file: Path, content: Content, user_key: bytes, set_id: bytes) -> bytes | None:
    """The data key that a file holds; None when it was wrapped by another key. Raises DamageError."""
    try:
        salt, wrapped, check = (bytes.fromhex(str(content[name])) for name in ("salt", "wrapped", "check"))
    except (KeyError, ValueError):
        raise DamageError(f"{file} lacks keys (offset 0)", BRING_BACK) from None
    wrapping = _wrapping_key(user_key, salt, set_id)
    if not hmac.compare_digest(_check_of(wrapping), check.hex()):
        return None
    data_key = sealing.unseal(sealing.cipher(wrapping), wrapped, set_id)
    if data_key is None or len(data_key) != sealing.KEY_BYTES:
        raise DamageError(f"{file} does not hold what the key wrapped (offset 0)", BRING_BACK)
    return data_key


def damaged(store: Path, opened: object = None) -> Iterator[tuple[Path, str, Path | None]]:
    """Which of both files is not as it was written: the file, what is wrong with it, and the other if that is whole.

    `opened`: what of them was unwrapped, where that is known; a whole file that holds something else is a foreign one.
    """
    told = dict[Path, str]()
    contents = dict[Path, Content]()
    for file in (store / name for name in FILES):
        try:
            contents[file] = _read(file)
        except DamageError as damage:
            told[file] = damage.message
    right = next((each for each in contents.values() if opened in (None, each["wrapped"])), None)
    for file, content in contents.items():
        if content != right:
            told[file] = f"{file} does not hold the data key of this store (offset 0)"
    for file in (store / name for name in FILES):
        if file in told:
            yield file, told[file], next((each for each in contents if each not in told), None)


def mend(store: Path, opened: object = None) -> list[Path]:
    """Write the one that is damaged again from the other, durably; returns it. Nothing when both are damaged."""
    mended = []
    for file, _, other in list(damaged(store, opened)):
        if other is not None:
            fsio.write_json(file, _read(other))
            mended.append(file)
    return mended


def _read(file: Path) -> Content:
    try:
        content = fsio.read_json(file)
    except FileNotFoundError:
        raise DamageError(f"{file} is missing (offset 0), and the store is encrypted", BRING_BACK) from None
    except OSError as error:
        raise DamageError(f"{file} cannot be read at offset 0: {error.strerror}", BRING_BACK) from None
    if content.get("format") != FORMAT or "wrapped" not in content:
        raise PgcdpError(
            f"{file} has format {content.get('format')}, this pgcdp reads {FORMAT}", "use the pgcdp that wrote it"
        )
    return content


def _wrapping_key(user_key: bytes, salt: bytes, set_id: bytes) -> bytes:
    """HKDF of RFC 5869: the user's key need not be as random as it should be."""
    return sealing.derive(hmac.digest(salt, user_key, "sha256"), b"pgcdp wrap" + set_id)


def _check_of(wrapping: bytes) -> str:
    return sealing.derive(wrapping, b"pgcdp check")[:16].hex()
