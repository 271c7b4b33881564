"""The map of a view as the engine reads it (FORMAT.md 5)."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pgcdp.errors import DamageError
from pgcdp.records import MAP_EXTENT, Volume

_HEADER = struct.Struct("<8sII16sQQIIQ")
_VOLUME = struct.Struct("<64sQII")
_SOURCE = struct.Struct("<I4sQQII")
_CHECKSUM_AT = 56
_IMAGE, _FRAMES = 0, 1

PATCH = b"PTCH"
"""Content of the frames file that a map brings along."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """The image of a volume: PATH.img and PATH.sums."""

    path: Path


@dataclass(frozen=True, slots=True)
class FramesSource:
    """A finished frames file: what its header must say, and where it is."""

    path: Path
    content: bytes
    interval: int


MapSource = ImageSource | FramesSource


@dataclass(frozen=True, slots=True)
class ViewMap:
    """A whole map. `images` are the numbers of the sources that are the images of `volumes`, in their order."""

    set_id: bytes
    volumes: tuple[Volume, ...]
    images: tuple[int, ...]
    sources: tuple[MapSource, ...]
    extents: NDArray[np.void]


def encode(view: ViewMap) -> bytes:
    """The bytes of the map's file."""
    paths = [os.fsencode(source.path) for source in view.sources]
    at = _HEADER.size + len(view.volumes) * _VOLUME.size + len(paths) * _SOURCE.size
    parts = [
        _VOLUME.pack(volume.name.encode(), volume.bytes, image, 0)
        for volume, image in zip(view.volumes, view.images, strict=True)
    ]
    for source, path in zip(view.sources, paths, strict=True):
        if isinstance(source, ImageSource):
            parts.append(_SOURCE.pack(_IMAGE, bytes(4), 0, at, len(path), 0))
        else:
            parts.append(_SOURCE.pack(_FRAMES, source.content, source.interval, at, len(path), 0))
        at += len(path)
    parts += [*paths, bytes(-at % 8), view.extents.astype(MAP_EXTENT).tobytes()]
    body = b"".join(parts)
    length = _HEADER.size + len(body)
    counts = (length, len(view.extents), len(view.sources), 0)
    head = _HEADER.pack(b"PGCDPMAP", 1, len(view.volumes), view.set_id, *counts, 0)
    checksum = xxhash.xxh3_64(head)
    checksum.update(body)
    return head[:_CHECKSUM_AT] + struct.pack("<Q", checksum.intdigest()) + body


def decode(raw: bytes, path: Path) -> ViewMap:
    """What the bytes of a map's file say. Raises DamageError when its checksum or its head is wrong."""
    head = raw[: _HEADER.size]
    zeroed = head[:_CHECKSUM_AT] + bytes(8) + raw[_HEADER.size :]
    if len(head) < _HEADER.size or raw[_CHECKSUM_AT : _HEADER.size] != struct.pack(
        "<Q", xxhash.xxh3_64_intdigest(zeroed)
    ):
        raise DamageError(f"{path} has a wrong header or checksum at offset 0", "run the command again")
    magic, version, volume_count, set_id, length, extent_count, source_count, _, _ = _HEADER.unpack(head)
    if magic != b"PGCDPMAP" or version != 1 or length != len(raw):
        raise DamageError(f"{path} has a wrong header or checksum at offset 0", "run the command again")
    at = _HEADER.size
    volumes, images = [], []
    for number in range(volume_count):
        name, size, image, _ = _VOLUME.unpack_from(raw, at)
        volumes.append(Volume(number, name.rstrip(b"\0").decode(), size))
        images.append(image)
        at += _VOLUME.size
    sources: list[MapSource] = []
    for _ in range(source_count):
        kind, content, interval, place, size, _ = _SOURCE.unpack_from(raw, at)
        where = Path(os.fsdecode(raw[place : place + size]))
        sources.append(ImageSource(where) if kind == _IMAGE else FramesSource(where, content, interval))
        at += _SOURCE.size
    extents = np.frombuffer(
        raw, dtype=MAP_EXTENT, count=extent_count, offset=length - extent_count * MAP_EXTENT.itemsize
    )
    return ViewMap(set_id, tuple(volumes), tuple(images), tuple(sources), extents)
