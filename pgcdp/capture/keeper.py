"""Replaces a capture process that died while a holder keeps its connection, and a holder that died under a live one.

A thread, in the agent as long as that lives and in each command that holds the set's lock: what is above the volumes
waits for it, and so may the command. It is told of an end by the kernel (pidfd), so that the next process starts at
once; one that does not come up or does not live long is tried again ever more slowly, without end: what mends it (a
disk that is mounted again) may come late, and until then nothing is lost.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

from pgcdp import log
from pgcdp.capture import children, held, holder
from pgcdp.capture.holder import Process
from pgcdp.errors import PgcdpError
from pgcdp.sets import SetPaths

logger = log.get(__name__)

LOOK_SECONDS = 1.0
"""How often it is looked for processes when there are none to be told of."""
SOON_SECONDS = 0.05
LATEST_SECONDS = 5.0
"""Pause before the next try after a failure, and what it grows to, doubling."""
LIVED_SECONDS = 1.0
"""A capture process that lived shorter counts as a failure, too."""
JOIN_SECONDS = 10.0


class Keeper:
    """A context manager: it keeps inside.

    `started` is called, in the keeper's thread, when it has started a capture process: with the seconds that this took.
    `error` is what keeps it from that, "" when nothing does.
    """

    def __init__(self, paths: SetPaths, started: Callable[[float], None] | None = None) -> None:
        self.paths = paths
        self.error = ""
        self._started = started
        self._pause = 0.0
        self._begun = -LIVED_SECONDS
        self._ended = threading.Event()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        os.close(self._waker)
        self._thread.join(JOIN_SECONDS)
        if not self._thread.is_alive():
            os.close(self._wake)

    def _run(self) -> None:
        if holder.missing() is not None:
            return
        self._look()  # at least once: a command may be over at once
        while not self._ended.is_set():
            self._look()

    def _look(self) -> None:
        """Mend what is to be mended, then wait until one of the two has ended. Raises nothing: nobody else keeps."""
        found: list[Process] = []
        try:
            self._mend(found)
            self.error = ""
        except held.Broken:
            self.error = ""
        except (PgcdpError, OSError) as error:  # without a descriptor to be had not even a look is possible
            self._failed(error)
        except Exception as error:  # a bug in us: what is above the volumes must not wait for ever for it
            logger.exception("unexpected")
            self._failed(error)
        finally:
            try:
                self._wait(found)
            finally:
                for each in found:
                    os.close(each.ended)
        children.reap()

    def _mend(self, found: list[Process]) -> None:
        """Have both live; `found` gets who was seen to."""
        capture = _seen(found, holder.process_at(self.paths.control))
        keeping = _seen(found, holder.holder_process(self.paths))
        if keeping and not capture:
            self._replace()
            _seen(found, holder.process_at(self.paths.control))
        elif capture and not keeping:
            self._hold_again()
            _seen(found, holder.holder_process(self.paths))

    def _hold_again(self) -> None:
        """A holder follows one that died; a capture process that never had one is left as it is."""
        if self.error and self._ended.wait(LOOK_SECONDS):
            return
        held.mend(self.paths)

    def _replace(self) -> None:
        """A capture process follows one that died."""
        since = time.monotonic()
        if since - self._begun >= LIVED_SECONDS + self._pause:
            self._pause = 0.0
        if self._pause and self._ended.wait(self._pause):
            return
        self._begun = time.monotonic()
        self._pause = min(LATEST_SECONDS, max(SOON_SECONDS, 2 * self._pause))
        if not held.mend(self.paths):
            return
        seconds = time.monotonic() - since
        logger.info("the capture process had died, another one serves after %.3f s", seconds)
        if self._started is not None:
            self._started(seconds)

    def _failed(self, error: Exception) -> None:
        message = getattr(error, "message", None) or str(error)
        if message != self.error:
            logger.error("no capture process takes over, what is above the volumes waits: %s", message)
        self.error = message

    def _wait(self, processes: list[Process]) -> None:
        """Until one of these has ended or the keeper shall; not long where there are not both, or something failed."""
        look = select.poll()
        for file in (*(process.ended for process in processes), self._wake):
            look.register(file, select.POLLIN)
        if self.error:
            timeout: float | None = SOON_SECONDS * 1000  # what is tried again waits longer by itself
        else:
            timeout = None if len(processes) == 2 else LOOK_SECONDS * 1000
        if not self._ended.is_set():
            look.poll(timeout)


def _seen(found: list[Process], process: Process | None) -> bool:
    if process is not None:
        found.append(process)
    return process is not None
