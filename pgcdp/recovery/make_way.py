"""Before the image moves: every open view gets a map that does not need what the move changes (truth 6).

Each view is asked by a thread of its own, so that the stages, which wait a moment only and else come again, go on
taking writes from the journal. A view that has not acknowledged its map in time, whatever the reason, is fenced: its
engine is killed, which makes everything above it EIO, and the image waits until the engine's end.

The image may move when, with new views kept out all the while, each open one was asked and has answered that it has the
map. An answer to an earlier question does not count: between the two somebody may have given it another map.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pgcdp.capture.control import EngineClient
from pgcdp.capture.engine import end_views
from pgcdp.errors import PgcdpError
from pgcdp.recovery.mapfile import decode
from pgcdp.recovery.view import FENCED_FILE, exchange, moved_on
from pgcdp.store.bundle import Bundle
from pgcdp.store.image import read_state
from pgcdp.store.layout import Store
from pgcdp.store.open_views import OpenView, open_views

log = logging.getLogger(__name__)

MOMENT_SECONDS = 1.0
"""So long one call waits; what a healthy view needs is a small part of it."""
AGAIN_SECONDS = 0.2
"""A view that refused is asked again after this: it may be ending."""


class MakeWay:
    """What `intervals.stages` calls with readers kept out of the image. `fence_after`: seconds for a view's answer.

    `say` hears what the image waits for, "" when that is over.
    """

    def __init__(self, fence_after: float, say: Callable[[str], None] = lambda text: None) -> None:
        self.fence_after = fence_after
        self._say = say
        self._said = ""
        self._asked: dict[Path, _Question] = {}
        self._killed: set[Path] = set()

    def __call__(self, store: Store, bundle: Bundle) -> bool:
        """Whether no open view needs any more what interval `bundle` changes in the image. False: call it again."""
        views = open_views(store)
        self._forget({view.file for view in views})
        self._settle(views, bundle)
        fresh = [view for view in views if view.file not in self._asked and view.file not in self._killed]
        for view in fresh:
            self._asked[view.file] = _Question(view, store, bundle, self.fence_after)
        until = time.monotonic() + MOMENT_SECONDS
        for question in self._asked.values():
            question.answered.wait(max(until - time.monotonic(), 0))
        have_it = {view.file for view in fresh if self._asked[view.file].has_it()}
        self._settle(fresh, bundle)
        waiting = [view for view in views if view.file not in have_it and self._lives(view)]
        self._tell(bundle, waiting)
        return not waiting

    def _forget(self, files: set[Path]) -> None:
        for file in set(self._asked) - files:
            del self._asked[file]
        self._killed &= files

    def _lives(self, view: OpenView) -> bool:
        if view.file in self._killed:
            end_views(view.file, MOMENT_SECONDS)
        return view.is_open()

    def _settle(self, views: list[OpenView], bundle: Bundle) -> None:
        """What follows from answers: nothing, or the view's end."""
        for view in views:
            if view.file in self._asked and self._asked[view.file].answered.is_set():
                why = self._asked.pop(view.file).why
                if why is not None and view.is_open():
                    self._condemn(view, bundle, why)

    def _condemn(self, view: OpenView, bundle: Bundle, why: str) -> None:
        text = (
            f"the view of write {view.write} was fenced: in {self.fence_after:g} s it did not learn "
            f"that the image moves to boundary {bundle.number}: {why}"
        )
        log.warning("%s", text)
        with suppress(OSError):  # its directory may be gone, or its disk full
            (view.control.parent / FENCED_FILE).write_text(text)
        self._killed.add(view.file)

    def _tell(self, bundle: Bundle, waiting: list[OpenView]) -> None:
        places = ", ".join(f"write {view.write} ({view.control.parent})" for view in waiting)
        text = f"the image waits at boundary {bundle.number - 1} for views of {places}" if waiting else ""
        if text and text != self._said:
            log.warning("%s; what does not answer in %g s is fenced", text, self.fence_after)
        self._said = text
        self._say(text)


class _Question:
    """A view is asked, for at most `seconds`, to take the map under which the image may move by an interval."""

    def __init__(self, view: OpenView, store: Store, bundle: Bundle, seconds: float) -> None:
        self.answered = threading.Event()
        self.why: str | None = "it was not asked"
        self._view = view
        self._store = store
        self._bundle = bundle
        self._until = time.monotonic() + seconds
        threading.Thread(target=self._run, name="view", daemon=True).start()

    def has_it(self) -> bool:
        """Whether the view has acknowledged the map."""
        return self.answered.is_set() and self.why is None

    def _run(self) -> None:
        try:
            self.why = self._ask()
        except Exception as error:  # a bug in us must not move the image
            log.exception("unexpected")
            self.why = repr(error)
        finally:
            self.answered.set()

    def _ask(self) -> str | None:
        """None when the view has the map; else why not."""
        while True:
            try:
                self._give_map()
                return None
            except (PgcdpError, OSError) as error:
                why = getattr(error, "message", None) or str(error)
            if time.monotonic() >= self._until or not self._view.is_open():
                return why
            time.sleep(AGAIN_SECONDS)

    def _give_map(self) -> None:
        client = EngineClient(self._view.control, timeout=self._left())
        file = Path(client.request("status")["map"])
        shown = decode(file.read_bytes(), file)
        # Asked by an agent that has begun anew since, and the image has moved: the map may be made for it as it is now.
        if read_state(self._store).boundary >= self._bundle.number:
            return
        following = moved_on(shown, self._bundle)
        if following is not None:
            exchange(client, file, following, self._left())

    def _left(self) -> float:
        return max(self._until - time.monotonic(), 0.1)
