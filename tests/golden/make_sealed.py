"""Makes the golden files of an encrypted store: a writer of engine/FORMAT.md 7 without pgcdp's code.

    python -m tests.golden.make_sealed      writes sealed/ beside this file

Nonces and salts are drawn from what they are for, so that each run writes the same. `expected.json` says what a reader
with the user's key must find.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from typing import Any

import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.golden.make_golden import BLOCK, BOOT_NS, HERE, MARK, SET_ID, WALL_NS, WRITE, _zeroed, block

USER_KEY = hashlib.sha256(b"the user's key").digest()
DATA_KEY = hashlib.sha256(b"the data key").digest()
INTERVAL = 3
NAME = "a mark that nobody may read: größer"
SETTINGS = {"port": "5432", "who": "größer"}


def drawn(what: str, length: int) -> bytes:
    """Instead of random bytes."""
    return hashlib.sha256(what.encode()).digest()[:length]


def derived(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, purpose + b"\x01", "sha256")


def whole(content: dict[str, Any]) -> bytes:
    """A JSON file as in section 3."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps({**content, "checksum": xxhash.xxh3_64_hexdigest(text.encode())}, indent=1).encode()


def encryption() -> dict[str, Any]:
    """7.1"""
    salt, nonce = drawn("salt of the user's key", 16), drawn("nonce of the data key", 12)
    wrapping = derived(hmac.digest(salt, USER_KEY, "sha256"), b"pgcdp wrap" + SET_ID)
    return {
        "format": 1,
        "cipher": "AES-256-GCM",
        "salt": salt.hex(),
        "check": derived(wrapping, b"pgcdp check")[:16].hex(),
        "wrapped": (nonce + AESGCM(wrapping).encrypt(nonce, DATA_KEY, SET_ID)).hex(),
    }


def sealed_file(place: str, content: bytes) -> bytes:
    """7.2"""
    head, nonce = struct.pack("<8sII", b"PGCDPSEA", 1, 0), drawn(place, 12)
    sealed = AESGCM(derived(DATA_KEY, b"pgcdp file")).encrypt(nonce, content, head + place.encode())
    return head + nonce + bytes(4) + sealed


def sealed_frames(content: bytes, pieces: list[tuple[int, bytes]]) -> bytes:
    """7.3, of (codec, raw bytes) pieces."""
    salt = drawn(f"salt of {content.decode()}", 16)
    out = _zeroed(struct.pack("<8sI4s16sQ16sQ", b"PGCDPFRM", 2, content, SET_ID, INTERVAL, salt, 0), 56)
    cipher = AESGCM(derived(DATA_KEY, b"pgcdp frames" + out[8:56]))
    directory, position = b"", 0

    def frame(codec: int, where: int, raw: bytes) -> bytes:
        plain = zstandard.ZstdCompressor(3).compress(raw) if codec == 1 else raw
        head = struct.pack("<4sIQII", b"FRAM", 256 + codec, where, len(raw), 12 + len(plain) + 16)
        nonce = drawn(f"frame {content.decode()} {codec} {where}", 12)
        return _zeroed(head + bytes(8) + nonce + cipher.encrypt(nonce, plain, head), 24)

    for codec, raw in pieces:
        encoded = frame(codec, position, raw)
        directory += struct.pack("<QQII", position, len(out), len(raw), len(encoded) - 32)
        out += encoded
        position += len(raw)
    trailer = struct.pack("<8sQQ", b"PGCDPEND", len(out), len(pieces))
    return out + frame(255, position, directory) + trailer + struct.pack("<Q", xxhash.xxh3_64_intdigest(trailer))


def index() -> bytes:
    """Two writes with a mark between them."""
    rows, position = b"", 0
    for number, (kind, volume, length, stored) in enumerate(
        [(WRITE, 0, BLOCK, BLOCK), (MARK, 65535, 0, len(NAME.encode())), (WRITE, 1, BLOCK, BLOCK)], 1
    ):
        times = (WALL_NS + number, BOOT_NS + number)
        rows += struct.pack("<BBHIQQQQQQQ", kind, 0, volume, stored, number, *times, 0, length, position, 0)
        position += stored
    return rows


def sealed_block(volume: int, number: int, content: bytes) -> tuple[bytes, bytes]:
    """7.4: a block of the image, and its entry."""
    nonce = drawn(f"block {volume} {number}", 12)
    cipher = AESGCM(derived(DATA_KEY, b"pgcdp image" + struct.pack("<HI", volume, number // 16384)))
    sealed = cipher.encrypt(nonce, content, struct.pack("<Q", number))
    return sealed[:BLOCK], nonce + sealed[BLOCK:] + struct.pack("<I", 1)


def main() -> None:
    store = HERE / "sealed"
    interval, image = store / f"{INTERVAL:010d}", store / "image"
    for place in (store, interval, image):
        place.mkdir(exist_ok=True)
    for name in ("encryption.json", "encryption-copy.json"):
        (store / name).write_bytes(whole(encryption()))
    (store / "gaps.json").write_bytes(sealed_file("gaps.json", whole({"behind": 17})))
    (interval / "settings.json").write_bytes(sealed_file(f"{interval.name}/settings.json", whole(SETTINGS)))
    (interval / "writes").write_bytes(sealed_frames(b"WRIT", [(0, block(1) + NAME.encode()), (1, block(2))]))
    (interval / "index").write_bytes(sealed_frames(b"INDX", [(1, index())]))
    blocks = [sealed_block(1, 0, block(7)), (bytes(BLOCK), bytes(32)), sealed_block(1, 2, block(8))]
    (image / "wal.img").write_bytes(b"".join(content for content, _ in blocks))
    (image / "wal.sums").write_bytes(b"".join(entry for _, entry in blocks))
    expected = {
        "user_key": USER_KEY.hex(),
        "data_key": DATA_KEY.hex(),
        "set_id": SET_ID.hex(),
        "gaps.json": {"behind": 17},
        "settings.json": SETTINGS,
        "mark": {"write": 2, "name": NAME},
        "words": {"writes": [1, 2], "image": [7, 0, 8]},
    }
    (store / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
