"""Watch the processes that own kernels, by pidfd: told once, at their end, without polling."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from warmcell.sandbox.backends.processes import start_time

BOOT = Path("/proc/sys/kernel/random/boot_id")


def process_name(pid: int) -> str:
    """What no other process is ever called, although pids are used again. Empty: it has ended, or is not in sight."""
    started = start_time(pid) if pid > 0 else None
    return "" if started is None else f"{pid}-{started}-{BOOT.read_text().strip()}"


def pid_of(name: str) -> int | None:
    """The process of this name, if it lives."""
    pid = name.partition("-")[0]
    return int(pid) if pid.isdecimal() and process_name(int(pid)) == name else None


class OwnerWatch:
    """Calls back when a process has ended; `alive` says whether it still runs."""

    def __init__(self, pid: int, ended: Callable[[], None]) -> None:
        """A process that is gone already is reported from the loop, as if it ended now. `ended` is not called twice.

        One that cannot be seen from here (pid 0: it lives in a pid namespace beside ours) counts as alive.
        """
        self.pid = pid
        self.alive = True
        self.leaving = False
        """It has said that it will let go."""
        self.over = asyncio.Event()
        """Set when it has ended, or owns no more."""
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
        self.over.set()
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
