"""The files of the machine's lease directory: opened without a trap, locked, and looked at one keeper at a time.

The directory has the sticky bit as /tmp has, so nobody removes another's file. In such a directory the kernel
may refuse to open somebody else's file for creation (fs.protected_regular), so files are linked into place
complete, and then only opened.
"""

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from warmcell.sandbox.errors import BackendUnavailableError, OperationTimeoutError

GRANTS = "grants.lock"
NEW = ".warmcell-new-"
"""How files begin that are not in place yet."""

RETRY_S = 0.005


class LeaseFiles:
    """All calls block for a moment at most, so they belong in a thread."""

    def __init__(self, path: Path, *, timeout: float = 5.0) -> None:
        """Nothing is made before the first grant.

        Args:
            path: The directory; one for all users of the machine, on a local file system.
            timeout: Seconds to wait for another keeper's grant to be through.
        """
        self.path = path
        self._timeout = timeout

    @contextmanager
    def _granting(self) -> Iterator[bool]:
        """Hold `grants.lock`. False where the directory does not exist, so that nobody holds anything."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                descriptor = self._open(GRANTS, create=self.path.is_dir(), flags=os.O_RDONLY)
            except FileNotFoundError:
                yield False
                return
            try:
                # flock knows no deadline, and its holders are done in less than a millisecond.
                while not lock(descriptor):
                    if time.monotonic() > deadline:
                        raise OperationTimeoutError(
                            f"Another keeper has been granting GPUs for {self._timeout:g} s",
                            hint=f"Find it with `fuser {self.path / GRANTS}`, and stop it if it hangs.",
                            details={"operation": "lease", "timeout": self._timeout},
                        )
                    time.sleep(RETRY_S)
                if self._is_at(descriptor, GRANTS):
                    yield True
                    return
            finally:
                os.close(descriptor)

    def _is_at(self, descriptor: int, name: str) -> bool:
        """Whether the open file is still the one of that name; somebody may have cleaned up meanwhile."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path / name, follow_symlinks=False))
        return False

    def _open(self, name: str, *, create: bool, flags: int = os.O_RDWR) -> int:
        """Open a file of the directory; no child process inherits it."""
        path = self.path / name
        while True:
            try:
                descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                if not create:
                    raise
                self._create(path)
            except OSError as error:
                raise unusable(path, error) from error
            else:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return descriptor
                os.close(descriptor)
                raise unusable(path, OSError(errno.EINVAL, "it is no regular file"))

    def _create(self, path: Path) -> None:
        """Put an empty file there that every user may lock, unless there is one by now."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=NEW) as made:
                os.fchmod(made.fileno(), 0o666)
                with suppress(FileExistsError):
                    os.link(made.name, path)
        except OSError as error:
            raise unusable(path, error) from error

    def _make(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.path.mkdir()
                self.path.chmod(0o1777)
            if not stat.S_ISDIR(self.path.lstat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "it is no directory")
        except OSError as error:
            raise unusable(self.path, error) from error


def lock(descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
    """Whether it could be locked at once."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unusable(path: Path, error: OSError) -> BackendUnavailableError:
    """The directory, or a file in it, does not serve."""
    directory = path if path.is_dir() or not path.suffix else path.parent
    return BackendUnavailableError(
        f"The GPU lease {path} cannot be used: {error.strerror or error}",
        hint=f"As root: `install -d -m 1777 {directory}`, and remove from it what is no lease;"
        " or set WARMCELL_LEASE_DIR to a directory that all users of the GPUs share.",
    )
