"""The stop button while something is done that must be known to its end, whatever becomes of it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


class Presses:
    """How often the button was pressed, and when first."""

    def __init__(self) -> None:
        self.count = 0
        self._first = 0.0

    @property
    def seconds_ago(self) -> float:
        """Since the first; 0 where there was none."""
        return time.monotonic() - self._first if self.count else 0.0

    def press(self, *_: object) -> None:
        """Once more."""
        self._first = self._first or time.monotonic()
        self.count += 1


@contextlib.contextmanager
def held() -> Iterator[Presses]:
    """Within this an interrupt raises nothing and is counted. What is done in other threads is never interrupted."""
    presses = Presses()
    if threading.current_thread() is not threading.main_thread():
        yield presses
        return
    before = signal.signal(signal.SIGINT, presses.press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
