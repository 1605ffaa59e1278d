"""Connections from this process to the keeper: counted, and none begins while the kernel is being saved."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_changed = threading.Condition()
_connections = 0
_closed = False
_before: list[Callable[[], None]] = []


def before_shutting(do: Callable[[], None]) -> None:
    """Have this done each time before the kernel is saved, as closing what is open and not used."""
    _before.append(do)


@contextlib.contextmanager
def passing(timeout: float | None) -> Iterator[None]:
    """Within this there may be a connection; waits before it while the kernel is being saved.

    Raises:
        TimeoutError: It still is after `timeout` seconds.
    """
    global _connections
    with _changed:
        if not _changed.wait_for(lambda: not _closed, timeout):
            raise TimeoutError("the kernel is being saved")
        _connections += 1
    try:
        yield
    finally:
        with _changed:
            _connections -= 1
            _changed.notify_all()


def shut(*, timeout: float) -> bool:
    """Let no more begin, and wait until those that are have ended; False, and nothing changed, if they do not."""
    global _closed
    deadline = time.monotonic() + timeout
    with _changed:
        _closed = True
        if _changed.wait_for(lambda: _connections == 0, max(0.0, deadline - time.monotonic())):
            for do in _before:
                do()
            return True
        _closed = False
        _changed.notify_all()
        return False


def reopen() -> None:
    """Let them begin again."""
    global _closed
    with _changed:
        _closed = False
        _changed.notify_all()
