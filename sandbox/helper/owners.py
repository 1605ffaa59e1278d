"""Whose the sandboxes are that the helper has made: small files on a file system that ends with the machine's run.

A sandbox is known by the number of its first process and when that began, a reservation by its warden's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from warmcell.sandbox.backends.processes import start_time
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Owners:
    """The register. Each worker of the helper uses it by itself."""

    def __init__(self, directory: str, *, most: int) -> None:
        self._directory = directory
        self._most = most

    @contextlib.contextmanager
    def place(self, uid: int) -> Iterator[str]:
        """Hold one of a user's places, as long as it is needed or this process lives; what to `enter` with.

        Raises:
            HelperError: The user has as many sandboxes as one may have.
        """
        os.makedirs(self._directory, 0o700, exist_ok=True)
        name = f"w-{os.getpid()}-{start_time(os.getpid())}-{uid}"
        with open(f"{self._directory}/lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._count(uid) >= self._most:
                raise HelperError(
                    "capacity",
                    f"You have {self._most} sandboxes, and the helper makes no more for one user",
                    hint="Stop one: `warmcell ps` lists them.",
                )
            self._write(name)
        try:
            yield name
        finally:
            self._remove(name)

    @contextlib.contextmanager
    def owned(self, pid: int, uid: int) -> Iterator[None]:
        """The sandbox with this first process is the user's, as long as this process holds it."""
        name = f"p-{pid}-{start_time(pid)}-{uid}"
        self._write(name)
        try:
            yield
        finally:
            self._remove(name)

    def owns(self, uid: int, pid: int, began: int) -> bool:
        """Whether the sandbox with this first process was made for the user."""
        return os.path.exists(f"{self._directory}/p-{pid}-{began}-{uid}")

    def _count(self, uid: int) -> int:
        """How many a user has; what processes that were killed have left is removed."""
        found = 0
        for name in os.listdir(self._directory):
            parts = name.split("-")
            if len(parts) != 4:
                continue
            if start_time(int(parts[1])) != int(parts[2]):
                self._remove(name)
            elif parts[0] == "w" and int(parts[3]) == uid:
                found += 1
        return found

    def _write(self, name: str) -> None:
        os.close(os.open(f"{self._directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self._directory}/{name}")
