"""A page file that nobody needs any more, kept for a while to be written over.

Its blocks are on the disk and its pages in the page cache already. To find both anew takes three times as long as to
write, and on a virtual machine whose host takes back free memory ten times. Linux drops the pages where it is short.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time

LEAST_BYTES, MOST_BYTES = 64 << 20, 4 << 30
"""Of what is worth it, and of what is kept at most."""
ROOM = 8
"""The disk has so many times as much left, or nothing is kept."""
KEPT_S = 600.0


class Spare:
    """One file at most, in a directory of root's."""

    def __init__(self, folder: str) -> None:
        self._path = f"{folder}/.spare"

    def keep(self, path: str, *, length_bytes: int) -> bool:
        """Take a file that has one name and is mounted nowhere; False, and it is as it was, where it is not wanted.

        Args:
            path: Of the file. It is gone from there afterwards.
            length_bytes: How much of it has been written.
        """
        taken = os.stat(path).st_blocks * 512
        if not LEAST_BYTES <= taken <= MOST_BYTES or taken <= self._taken() or not self._has_room(taken):
            return False
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            # Linux grants this only where nobody else has the file open, or mapped. Who opens it in this very moment
            # ends the lease, of which one is told by a signal; SIGIO, unless another is chosen, would be our end.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.ftruncate(fd, length_bytes)
            os.utime(fd)
            os.rename(path, self._path)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def take(self, path: str, *, length_bytes: int) -> int | None:
        """Give the file this name, if there is one of about that size; it is open for writing, and may be longer."""
        taken = self._taken()
        if length_bytes < LEAST_BYTES or not 0 < taken <= 2 * length_bytes:
            return None
        try:
            os.rename(self._path, path)
        except FileNotFoundError:  # Somebody else has just taken it.
            return None
        os.chmod(path, 0o600)
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def expire(self) -> None:
        """Remove it when it was of no use for long, or the disk gets full."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._path)
            if time.time() - found.st_mtime > KEPT_S or not self._has_room(found.st_blocks * 512):
                self.discard()

    def discard(self) -> None:
        """Remove it. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def is_there(self) -> bool:
        """Whether there is one."""
        return self._taken() > 0

    def _taken(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self._path).st_blocks * 512
        return 0

    def _has_room(self, size_bytes: int) -> bool:
        found = os.statvfs(os.path.dirname(self._path))
        return found.f_bavail * found.f_frsize >= ROOM * size_bytes
