"""The first backup image: copied while the cluster runs and takes writes; the journal corrects it.

The copy goes through each volume once. Let p be the place it has reached and q the journal's write it has gone through:

    blocks below p: every write up to q is in the image; later ones are applied when the journal is read on
    blocks from p on: not copied yet; a write up to q is on the volume already, so the copy brings it

The second line holds because the journal is only read up to what the engine has synced on the volumes: what is only
applied may be lost for a while when a sync fails. A block copied
with content newer than q goes back and forth once more while the journal is read on, and ends right: all writes behind
q come, in order. So segments up to q can be released as soon as the image is synced and says (p, q), and a journal
much smaller than the copy's writes is enough. The image is right at every write from the end of the copy on; it becomes
boundary 0 at the first checkpoint there.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType

from pgcdp.capture.journal import BatchRun
from pgcdp.errors import PgcdpError
from pgcdp.intervals.applying import apply_run
from pgcdp.records import BLOCK, Volume
from pgcdp.store.image import Image

CHUNK = 4 << 20


class VolumeReader:
    """Reads a backing beside the engine, past the page cache: what the engine wrote with O_DIRECT is what is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._buffer = mmap.mmap(-1, CHUNK)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes (a multiple of 4096, at most CHUNK). Raises PgcdpError when the volume is shorter."""
        with memoryview(self._buffer) as whole, whole[:length] as part:
            done = 0
            while done < length:
                with part[done:] as rest:
                    count = os.preadv(self._fd, [rest], offset + done)
                if count == 0:
                    raise PgcdpError(f"{self._path} ends at {offset + done}, before byte {offset + length}")
                done += count
            return bytes(part)

    def close(self) -> None:
        """Close the backing."""
        os.close(self._fd)
        self._buffer.close()


class Baseline:
    """One baseline under way. `copied` are bytes by volume name, `journal_write` is q above."""

    def __init__(self, image: Image, backings: list[Path]) -> None:
        self.image = image
        self.volumes: tuple[Volume, ...] = image.store.volumes
        self.copied = {volume.name: image.state.copied.get(volume.name, 0) for volume in self.volumes}
        self.journal_write = max(image.state.journal_write, image.state.from_write - 1)
        self._readers = [VolumeReader(path) for path in backings]

    @property
    def total(self) -> int:
        """Bytes of all volumes."""
        return sum(volume.bytes for volume in self.volumes)

    @property
    def done(self) -> int:
        """Bytes copied."""
        return sum(self.copied.values())

    @property
    def complete(self) -> bool:
        """Whether every block was copied."""
        return self.done == self.total

    def copy_chunk(self) -> None:
        """Copy the next few MiB."""
        for volume, reader in zip(self.volumes, self._readers, strict=True):
            at = self.copied[volume.name]
            if at < volume.bytes:
                length = min(CHUNK, volume.bytes - at)
                self.image.write_blocks(volume.number, at // BLOCK, reader.read(at, length))
                self.copied[volume.name] = at + length
                return

    def take(self, run: BatchRun) -> None:
        """Go through a run of the journal, all of it synced on the volumes by now: it changes what was copied."""
        if not len(run):
            return
        apply_run(self.image, run, [self.copied[volume.name] // BLOCK for volume in self.volumes])
        self.journal_write = run.last_write

    def save(self) -> None:
        """Make durable how far it is; writes up to `journal_write` may be released then."""
        self.image.set_baseline(self.journal_write, self.copied)

    def close(self) -> None:
        """Close the backings."""
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> Baseline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
