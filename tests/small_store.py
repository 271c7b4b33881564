"""A small store of a few intervals, made without a journal."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np

from pgcdp.intervals.increments import close_interval, move_image
from pgcdp.records import BLOCK, RECORD, Boundary, Volume
from pgcdp.store.image import Image
from pgcdp.store.layout import Store
from pgcdp.store.open_interval import OpenInterval

SET_ID = os.urandom(16)  # scratch places go by it, and other processes run the same tests
BLOCKS = 64


class PlainRun:
    """Writes without a journal."""

    def __init__(self, first: int, chooser: random.Random, count: int) -> None:
        self.records = np.zeros(count, dtype=RECORD)
        self.records["kind"] = 1
        self.records["number"] = np.arange(first, first + count)
        self.records["wall_ns"] = 10**18 + self.records["number"].astype(np.int64)
        self.records["offset"] = [chooser.randrange(BLOCKS // 2) * BLOCK for _ in range(count)]
        self.records["length"] = self.records["data_length"] = BLOCK
        self.data = np.frombuffer(chooser.randbytes(count * BLOCK), dtype=np.uint8)
        self.data_offsets = np.arange(count) * BLOCK


def boundary(number: int) -> Boundary:
    return Boundary(number, number * 10, 10**18 + number * 10, 100, 90, 1, 700, "period")


def make_store(place: Path, intervals: int = 3) -> Store:
    store = Store.create(place / "store", "s", SET_ID, [Volume(0, "data", BLOCKS * BLOCK)], {"made": "today"})
    chooser = random.Random(3)
    image = Image.create(store, 1)
    image.write_blocks(0, 0, chooser.randbytes(BLOCKS // 2 * BLOCK))
    image.set_at(0, 0)
    store = store.with_baseline(boundary(0))
    for number in range(1, intervals + 1):
        opened = OpenInterval.open(store, number, number * 10 - 9)
        opened.append(PlainRun(number * 10 - 9, chooser, 10))
        move_image(image, close_interval(store, opened, image, boundary(number), {"port": "5432"}))
    image.close()
    opened = OpenInterval.open(store, intervals + 1, intervals * 10 + 1)
    opened.append(PlainRun(intervals * 10 + 1, chooser, 5))
    opened.sync()
    opened.close()
    return store


def flip(path: Path, at: int, bit: int = 0) -> bytes:
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :])
    return raw
