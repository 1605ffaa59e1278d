"""Files in a sandbox's run directory, from the host: the guest can write there, so no name is trusted.

A guest may put a link, a pipe or another file where the host expects its own. So files are made anew
under names that do not exist, and opened only if they are plain files themselves.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from warmcell.sandbox.errors import ProtocolError

BEGIN = "begin"
"""FIFO in the run directory of a sandbox whose init is to come later: it waits for somebody to write there."""
RESTART = "Restart the sandbox."


def create(path: Path) -> BinaryIO:
    """Open a new file for writing, readable by the guest.

    Raises:
        ProtocolError: Something of that name is there already.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileExistsError as error:
        raise ProtocolError(f"The guest has put something at {path.name}", hint=RESTART) from error
    os.fchmod(fd, 0o644)
    return os.fdopen(fd, "wb")


def open_existing(path: Path) -> BinaryIO | None:
    """Open a file that the guest has written; None if there is none.

    Raises:
        ProtocolError: It is a link, a pipe or anything else but a plain file of its own.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _suspicious(path) from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        raise _suspicious(path)
    return os.fdopen(fd, "rb")


@contextlib.contextmanager
def knocking(path: Path) -> Iterator[None]:
    """Write a line to a FIFO at which a process of the guest waits, which may be about to; it is gone afterwards.

    Raises:
        ProtocolError: The guest has put something else there.
    """
    try:
        # For reading too, so that nobody has to be there yet, and what is written stays as long as this is open.
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ProtocolError(
            f"{path.name} in the run directory cannot be used: {error.strerror}", hint=RESTART
        ) from error
    try:
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise ProtocolError(f"{path.name} in the run directory is no FIFO", hint=RESTART)
        with contextlib.suppress(BlockingIOError):  # The guest has filled it, so there is something to be read.
            os.write(fd, b"\n")
        yield
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()


def _suspicious(path: Path) -> ProtocolError:
    return ProtocolError(f"{path.name} in the run directory is no plain file", hint=RESTART)
