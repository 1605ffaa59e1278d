"""The stop button while something is done that must be known to its end, whatever becomes of it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator


class Presses:
    """How often the button was pressed, and when first."""

    def __init__(self, most: int = 0) -> None:
        """Raise KeyboardInterrupt at once when it is pressed `most` times; 0: never."""
        self.count = 0
        self._most = most
        self._first = 0.0

    @property
    def seconds_ago(self) -> float:
        """Since the first; 0 where there was none."""
        return time.monotonic() - self._first if self.count else 0.0

    def press(self, *_: object) -> None:
        """Once more."""
        self._first = self._first or time.monotonic()
        self.count += 1
        if self.given_up:
            raise KeyboardInterrupt

    @property
    def given_up(self) -> bool:
        """Whether nobody wants to wait any more."""
        return 0 < self._most <= self.count


_now: list[Presses] = []


def check() -> None:
    """Raise KeyboardInterrupt if the button was pressed meanwhile: for what takes long and can be left here."""
    if _now and _now[-1].count and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@contextlib.contextmanager
def held(*, most: int = 0) -> Iterator[Presses]:
    """Within this an interrupt is counted. What is done in other threads is never interrupted.

    Raises:
        KeyboardInterrupt: From any place, if it comes `most` times; never where that is 0.
    """
    presses = Presses(most)
    if threading.current_thread() is not threading.main_thread():
        yield presses
        return
    before = signal.signal(signal.SIGINT, presses.press)
    _now.append(presses)
    try:
        yield presses
    finally:
        _now.remove(presses)
        signal.signal(signal.SIGINT, before)
