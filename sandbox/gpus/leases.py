"""Who has which GPU, across all users of the machine: one locked file per device.

A lease is an `flock` on a file named after the device's UUID, in a directory that all users share. The operating
system drops it when its holder dies, however that happens; what the file says is for people only. A second file,
`grants.lock`, is held for the moment of a grant or a look, so that two keepers which want several devices each do
not take half of them from one another.

The directory has the sticky bit as /tmp has, so nobody removes another's file. In such a directory the kernel
may refuse to open somebody else's file for creation (fs.protected_regular), so files are linked into place
complete, and then only opened.
"""

import errno
import fcntl
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import BackendUnavailableError, OperationTimeoutError
from warmcell.sandbox.gpus.processes import user_name
from warmcell.sandbox.models import SandboxId

GRANTS = "grants.lock"

_UUID = re.compile(r"(?:GPU|MIG)-[A-Za-z0-9-]{1,80}")
_NEW = ".warmcell-new-"
_OURS = re.compile(rf"{_UUID.pattern}\.lock|{re.escape(_NEW)}.*")
_LONGEST_NOTE = 4096
_RETRY_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a held lease says about its holder. Written by the holder, so true only as far as it is."""

    pid: int
    uid: int
    sandbox_id: str
    since: float
    """Unix time of the grant, in seconds."""

    def to_json(self, *, mine: bool) -> dict[str, Any]:
        """The wire form; `mine` says whether it is a sandbox of the keeper that is asked."""
        return {
            "sandbox_id": self.sandbox_id,
            "since": self.since,
            "mine": mine,
            "user": user_name(self.uid) if self.pid else "",
            "pid": self.pid,
        }

    def __str__(self) -> str:
        if self.pid == os.getpid():
            return f"sandbox {self.sandbox_id}"
        if not self.pid:
            return "somebody unknown"
        return f"sandbox {self.sandbox_id} of user {user_name(self.uid)} (keeper {self.pid})"


NOBODY_KNOWN = Holder(pid=0, uid=0, sandbox_id="", since=0.0)
"""The holder of a locked file that says nothing readable."""


class Lease:
    """A held lock on one device. It ends with `release` or with this process."""

    def __init__(self, uuid: str, descriptor: int, holder: Holder) -> None:
        self.uuid = uuid
        self.holder = holder
        self._descriptor = descriptor
        self._write()

    @property
    def held(self) -> bool:
        """Whether it has not been released."""
        return self._descriptor >= 0

    def move(self, to: SandboxId) -> None:
        """From now on another sandbox of this process holds it; there is no moment at which nobody does."""
        mine = self.holder
        self.holder = Holder(pid=mine.pid, uid=mine.uid, sandbox_id=to, since=mine.since)
        self._write()

    def release(self) -> None:
        """Give the device back. Idempotent."""
        if self.held:
            descriptor, self._descriptor = self._descriptor, -1
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            # Explicitly, since a copy of the descriptor in a forked child would keep the lock otherwise.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _write(self) -> None:
        held_by = self.holder
        note = {
            "pid": held_by.pid,
            "uid": held_by.uid,
            "sandbox_id": held_by.sandbox_id,
            "since": held_by.since,
        }
        # A full disk takes the note, not the lease.
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(note).encode(), 0)


class LeaseDirectory:
    """The machine's leases. All calls block for a moment at most, so they belong in a thread."""

    def __init__(self, path: Path, *, timeout: float = 5.0) -> None:
        """Nothing is made before the first grant.

        Args:
            path: The directory; one for all users of the machine, on a local file system.
            timeout: Seconds to wait for another keeper's grant to be through.
        """
        self.path = path
        self._timeout = timeout

    def acquire(
        self,
        uuids: Collection[str],
        choose: Callable[[Mapping[str, Holder]], Collection[str]],
        *,
        holder: SandboxId,
    ) -> tuple[Lease, ...]:
        """Lock some of `uuids`, all or none.

        Args:
            uuids: Devices that may be had.
            choose: Told who holds which of them, it names those to lock; none of the held ones. What it raises
                is raised here, and nothing is locked then.
            holder: The sandbox that the leases are for.

        Raises:
            BackendUnavailableError: The directory cannot be used.
            OperationTimeoutError: Another keeper has been granting for too long.
        """
        self._make()
        with self._granting() as present:
            assert present
            locked: dict[str, int] = {}
            taken: dict[str, Holder] = {}
            try:
                for uuid in uuids:
                    descriptor = self._open(_file_name(uuid), create=True)
                    if _lock(descriptor):
                        locked[uuid] = descriptor
                    else:
                        taken[uuid] = _read(descriptor)
                        os.close(descriptor)
                chosen = choose(taken)
                note = Holder(pid=os.getpid(), uid=os.getuid(), sandbox_id=holder, since=time.time())
                return tuple(Lease(uuid, locked.pop(uuid), note) for uuid in chosen)
            finally:
                for descriptor in locked.values():
                    os.close(descriptor)

    def holders(self, uuids: Collection[str]) -> dict[str, Holder]:
        """Who holds which of these devices; free ones are not listed. Makes nothing.

        Raises:
            BackendUnavailableError: The directory cannot be used.
            OperationTimeoutError: Another keeper has been granting for too long.
        """
        taken: dict[str, Holder] = {}
        with self._granting() as present:
            for uuid in uuids if present else ():
                with suppress(FileNotFoundError):
                    descriptor = self._open(_file_name(uuid), create=False)
                    try:
                        if not _lock(descriptor):
                            taken[uuid] = _read(descriptor)
                    finally:
                        os.close(descriptor)
        return taken

    def remove_stale(self) -> tuple[str, ...]:
        """Remove the files of leases that nobody holds, as far as they are this user's; with the last, the directory.

        Returns:
            The paths that are gone.

        Raises:
            BackendUnavailableError: The directory cannot be used.
            OperationTimeoutError: Another keeper has been granting for too long.
        """
        gone: list[str] = []
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return ()
        with self._granting() as present:
            assert present
            for entry in sorted(self.path.iterdir()):
                if _OURS.fullmatch(entry.name) and self._remove_if_free(entry):
                    gone.append(str(entry))
            with suppress(OSError):
                if [entry.name for entry in self.path.iterdir()] == [GRANTS]:
                    (self.path / GRANTS).unlink()
                    gone.append(str(self.path / GRANTS))
                    if self._could_be_made_again():
                        self.path.rmdir()
                        gone.append(str(self.path))
        return tuple(gone)

    def _could_be_made_again(self) -> bool:
        """Whether the next user who needs it may make it; else an administrator did, for all."""
        return bool(self.path.parent.stat().st_mode & stat.S_IWOTH) or os.getuid() != 0

    def _remove_if_free(self, entry: Path) -> bool:
        # Only while it is locked here: whoever waits for it sees afterwards that it is no longer the file.
        with suppress(OSError, BackendUnavailableError):
            descriptor = self._open(entry.name, create=False)
            try:
                if _lock(descriptor):
                    entry.unlink()
                    return True
            finally:
                os.close(descriptor)
        return False

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
                while not _lock(descriptor):
                    if time.monotonic() > deadline:
                        raise OperationTimeoutError(
                            f"Another keeper has been granting GPUs for {self._timeout:g} s",
                            hint=f"Find it with `fuser {self.path / GRANTS}`, and stop it if it hangs.",
                            details={"operation": "lease", "timeout": self._timeout},
                        )
                    time.sleep(_RETRY_S)
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
                raise _unusable(path, error) from error
            else:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    return descriptor
                os.close(descriptor)
                raise _unusable(path, OSError(errno.EINVAL, "it is no regular file"))

    def _create(self, path: Path) -> None:
        """Put an empty file there that every user may lock, unless there is one by now."""
        try:
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=_NEW) as made:
                os.fchmod(made.fileno(), 0o666)
                with suppress(FileExistsError):
                    os.link(made.name, path)
        except OSError as error:
            raise _unusable(path, error) from error

    def _make(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.path.mkdir()
                self.path.chmod(0o1777)
            if not stat.S_ISDIR(self.path.lstat().st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "it is no directory")
        except OSError as error:
            raise _unusable(self.path, error) from error


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> Holder:
    try:
        note = json.loads(os.pread(descriptor, _LONGEST_NOTE, 0))
        return Holder(
            pid=int(note["pid"]),
            uid=int(note["uid"]),
            sandbox_id=str(note["sandbox_id"])[:64],
            since=float(note["since"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return NOBODY_KNOWN


def _file_name(uuid: str) -> str:
    if _UUID.fullmatch(uuid) is None:
        raise BackendUnavailableError(
            f"{uuid!r} is no GPU UUID that a lease could be named after",
            hint="See what `nvidia-smi -L` lists, and whether the driver is the one that belongs to it.",
        )
    return f"{uuid}.lock"


def _unusable(path: Path, error: OSError) -> BackendUnavailableError:
    directory = path if path.is_dir() or not path.suffix else path.parent
    return BackendUnavailableError(
        f"The GPU lease {path} cannot be used: {error.strerror or error}",
        hint=f"As root: `install -d -m 1777 {directory}`, and remove from it what is no lease;"
        " or set WARMCELL_LEASE_DIR to a directory that all users of the GPUs share.",
    )
