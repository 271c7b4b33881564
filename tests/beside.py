"""What goes on beside a test, in threads of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(*steps: Callable[[], object], pause: float) -> Iterator[None]:
    """Each step again and again inside, `pause` seconds apart, in its own thread; the first error is raised at the end.

    An error ends its thread, so that the test waits in vain for what the step does.
    """
    stop = threading.Event()
    failures: list[Exception] = []

    def run(step: Callable[[], object]) -> None:
        try:
            while not stop.wait(pause):
                step()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
