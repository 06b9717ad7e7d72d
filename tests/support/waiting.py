"""Waiting for what must come, on a machine that may be slow: every wait has an end, and says what did not come.

PATIENCE is only there to stop a hang. Where the product promises a time, `Stopwatch` measures it fairly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE = 30.0  # seconds; far more than anything takes, so that a slow machine fails no test
_TICK = 0.01


def until(true: Callable[[], object], what: str = "it", seconds: float = PATIENCE) -> None:
    """Wait until something holds; fail when it does not in time, with the name of what was waited for."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what} did not come about in {seconds:g} s"
        time.sleep(_TICK)


class Stopwatch:
    """Seconds that pass on a machine that goes on: those in which it stood still are not counted.

    A thread wakes up each tick, and a tick counts for two at most, however late it comes. On an idle machine that is
    the clock's own time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Stopwatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(_TICK):
            now = time.monotonic()
            self.seconds += min(now - before, 2 * _TICK)
            before = now
