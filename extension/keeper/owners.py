"""Watch the processes that own kernels, by pidfd: told once, at their end, without polling."""

import asyncio
import os
from collections.abc import Callable


class OwnerWatch:
    """Calls back when a process has ended; `alive` says whether it still runs."""

    def __init__(self, pid: int, ended: Callable[[], None]) -> None:
        """A process that is gone already is reported from the loop, as if it ended now.

        One that cannot be seen from here (pid 0: it lives in a pid namespace beside ours) counts as alive.
        """
        self.pid = pid
        self.alive = True
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._fd: int | None = None
        self._soon: asyncio.Handle | None = None
        if pid <= 0:
            return
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._soon = self._loop.call_soon(self._gone)
        else:
            self._loop.add_reader(self._fd, self._gone)

    def close(self) -> None:
        """Watch no longer. Idempotent."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _gone(self) -> None:
        self.close()
        if self.alive:
            self.alive = False
            self._ended()
