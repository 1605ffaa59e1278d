"""How slowly somebody may send: a byte a minute would hold what waits for the rest for ever."""

import time
from collections.abc import Callable
from typing import Final

from warmcell.sandbox.errors import OperationTimeoutError

LEAST_BYTES_S: Final = 1024.0
"""Whoever sends this much on average is waited for without end."""

PATIENCE_S: Final = 120.0


class Pace:
    """Of one sender: the seconds that are waited for it altogether, of which what comes gives some back."""

    def __init__(self, patience_s: float = PATIENCE_S, *, now: Callable[[], float] = time.monotonic) -> None:
        """Nobody waits yet; `patience_s` is how long nothing at all may come."""
        self._patience_s = patience_s
        self._left_s = patience_s
        self._now = now
        self._since: float | None = None

    def wait(self) -> float:
        """It is waited for from now on: for how many seconds at most, until `came`."""
        self._since = self._now()
        return self._left_s

    def came(self, size_bytes: int) -> None:
        """So much has come, and is being worked on, which is not the sender's time."""
        waited = 0.0 if self._since is None else self._now() - self._since
        self._since = None
        self._left_s = min(self._patience_s, max(0.0, self._left_s - waited) + size_bytes / LEAST_BYTES_S)

    def stalled(self) -> OperationTimeoutError:
        """What whoever sends too slowly is told."""
        return OperationTimeoutError(
            f"The request did not come in time: {LEAST_BYTES_S:.0f} bytes a second are too much for its sender",
            hint=f"Send it again, without a pause of {self._patience_s:g} s.",
            details={"operation": "receive", "timeout": self._patience_s},
        )
