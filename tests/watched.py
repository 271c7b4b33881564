"""Open views that are read all the time and compared with the images that a restore made of the same points."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pgcdp.capture.control import EngineClient
from pgcdp.records import BLOCK, RecoveryPoint
from pgcdp.recovery import restore
from pgcdp.recovery.mapfile import ViewMap, decode
from pgcdp.recovery.source import Source
from pgcdp.recovery.view import shown
from tests.fix_engine import Direct
from tests.fix_sets import assert_equal
from tests.waiting import wait_until

PIECE = 64 * BLOCK


def images_at(place: Path, source: Source) -> list[Path]:
    """The files that `restore --to-image` makes at `place`, in order of volume number."""
    names = [volume.name for volume in source.store.volumes]
    return [place] if len(names) == 1 else [place / f"{name}.img" for name in names]


class Watched:
    """An open view's volumes, with a thread that reads pieces of them, `pause` seconds apart, and compares them."""

    def __init__(self, files: Sequence[Path], images: Sequence[Path], seed: int, pause: float = 0.0) -> None:
        self.files = list(files)
        self.images = list(images)
        self.place = self.files[0].parent.parent
        self.wrong: list[str] = []
        self.reads = 0
        self._pieces = [image.stat().st_size // PIECE for image in images]
        self._chooser = random.Random(seed)
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with ExitStack() as stack:
            devices = [stack.enter_context(Direct(file)) for file in self.files]
            images = [stack.enter_context(image.open("rb", buffering=0)).fileno() for image in self.images]
            while not self._stop.wait(self._pause) and not self.wrong:
                volume = self._chooser.randrange(len(devices))
                piece = self._chooser.randrange(self._pieces[volume])
                try:
                    content = devices[volume].read(piece * PIECE, PIECE)
                except OSError as error:
                    self.wrong.append(f"volume {volume} piece {piece}: {error}")
                    return
                if content != os.pread(images[volume], PIECE, piece * PIECE):
                    self.wrong.append(f"volume {volume} piece {piece} has changed")
                self.reads += 1

    def wait_reads(self, count: int) -> None:
        wait_until(lambda: self.reads > count or self.wrong, what="reads of the view")

    def status(self) -> dict[str, object]:
        return EngineClient(self.place / "control").request("status")

    def map(self) -> ViewMap:
        file = Path(str(self.status()["map"]))
        return decode(file.read_bytes(), file)

    def wanted(self) -> list[bytes]:
        """What each volume holds."""
        return [image.read_bytes() for image in self.images]

    def assert_unchanged(self) -> None:
        """Every byte, beside what the thread reads."""
        assert self.wrong == []
        assert_equal(self.files, self.images, f"{self.place}")

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def watched(source: Source, point: RecoveryPoint, place: Path, seed: int = 0) -> Iterator[Watched]:
    """A view in the new directory `place`, its image beside it."""
    place.mkdir()
    image = place.with_name(f"{place.name}-image")
    restore.to_image(source, point, image)
    with shown(source, point, place) as files:
        view = Watched(files, images_at(image, source), seed)
        try:
            yield view
        finally:
            view.end()
