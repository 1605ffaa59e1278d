"""End a user's keeper, and remove what it or a killed one left: for `warmcell clean`.

Nobody can start a keeper meanwhile, and only what has our names below our directories is touched.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import BackendError, OperationTimeoutError, WarmcellError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.paths import Paths

ANSWER_TIMEOUT_S = 15.0
"""A keeper that says nothing for so long is taken for one that hangs."""

END_TIMEOUT_S = 120.0
"""For the keeper to end its kernels and to stop its sandboxes; then it is killed."""

DELETE_TIMEOUT_S = 30.0
"""For one kernel."""

KILL_TIMEOUT_S = 30.0
START_TIMEOUT_S = 120.0
"""A start that is under way ends within this."""

_OUR_NAMES = re.compile(r"[A-Za-z0-9_-]{1,64}")
_RETRY_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """What was ended and removed."""

    keeper: int | None
    """pid of the keeper that was ended."""
    killed: bool
    """Whether it had to be forced."""
    removed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {"keeper": self.keeper, "killed": self.killed, "removed": list(self.removed)}


class Cleaning:
    """Cleans one user's directories. Blocks; not for an event loop."""

    def __init__(
        self, paths: Paths, *, end_timeout: float = END_TIMEOUT_S, answer_timeout: float = ANSWER_TIMEOUT_S
    ) -> None:
        self._paths = paths
        self._end_timeout = end_timeout
        self._answer_timeout = answer_timeout

    def running(self) -> str:
        """What would be ended, in words; empty if no keeper runs."""
        pid = self._keeper_pid()
        if pid is None:
            return ""
        count = self._count_sandboxes()
        if count is None:
            return f"A keeper (process {pid}) runs, but does not answer"
        return f"The keeper (process {pid}) runs with {count} sandbox{'' if count == 1 else 'es'}"

    def clean(self) -> Cleaned:
        """End the keeper with its kernels, and remove everything but logs, persistent homes, snapshots and images.

        Raises:
            OperationTimeoutError: The keeper cannot be ended, or one is being started for too long.
            BackendError: A mount is left below the runtime directory, so nothing is deleted there.
            BackendUnavailableError: The lease directory cannot be used.
        """
        from warmcell.sandbox.backends.docker.orphans import remove_images
        from warmcell.sandbox.backends.leftovers import clean_leftovers

        with self._no_start():
            pid, killed = self._keeper_pid(), False
            if pid is not None:
                ended = self._end_kernels()
                killed = self._end(pid)
                if ended:
                    self._paths.ledger.unlink(missing_ok=True)
            self._check_no_mounts()
            removed = [str(what) for what in clean_leftovers(self._paths)]
            removed += remove_images(self._paths)
            removed += self._remove_directories()
            removed += LeaseDirectory(self._paths.leases).remove_stale()
        with contextlib.suppress(OSError):
            self._paths.runtime.rmdir()
        return Cleaned(keeper=pid, killed=killed, removed=tuple(dict.fromkeys(removed)))

    def _count_sandboxes(self) -> int | None:
        from warmcell.sandbox.client.keeper import SyncKeeperClient

        try:
            with SyncKeeperClient(self._paths) as keeper:
                return len(keeper.get("/sandboxes", timeout=self._answer_timeout)["sandboxes"])
        except WarmcellError:
            return None

    def _end_kernels(self) -> bool:
        """Have the keeper end what it would else save for the keeper after it; whether it has done all of that."""
        from warmcell.sandbox.client.keeper import SyncKeeperClient

        deadline = time.monotonic() + self._end_timeout

        def left() -> float:
            return max(0.1, min(deadline - time.monotonic(), DELETE_TIMEOUT_S))

        try:
            with SyncKeeperClient(self._paths) as keeper:
                for kernel in keeper.get("/kernels", timeout=self._answer_timeout)["kernels"]:
                    keeper.delete(f"/kernels/{kernel['kernel_id']}", timeout=left())
        except WarmcellError:  # What it saves is taken up by the next keeper; nothing of it runs.
            return False
        return True

    def _keeper_pid(self) -> int | None:
        """The process that listens on the keeper's socket, else the one that holds its lock."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(self._answer_timeout)
            try:
                probe.connect(str(self._paths.keeper_socket))
            except OSError:
                return self._pid_of_lock()
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, uid, _ = struct.unpack("3i", credentials)
            return int(pid) if uid == os.getuid() else None

    def _pid_of_lock(self) -> int | None:
        """Without taking the lock, since a keeper that starts just now would think that another runs."""
        try:
            pid = int(json.loads(self._paths.keeper_lock.read_text())["pid"])
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            mine = Path(f"/proc/{pid}").stat().st_uid == os.getuid()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if mine and b"warmcell.extension.keeper" in arguments else None

    def _end(self, pid: int) -> bool:
        """End the keeper; whether it had to be killed."""
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            for signum, timeout in ((signal.SIGTERM, self._end_timeout), (signal.SIGKILL, KILL_TIMEOUT_S)):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signum)
                if select.select([process], [], [], timeout)[0]:
                    return signum is signal.SIGKILL
        finally:
            os.close(process)
        raise OperationTimeoutError(
            f"The keeper (process {pid}) did not end within {self._end_timeout + KILL_TIMEOUT_S:.0f} s of being killed",
            hint="It hangs in the operating system: see `dmesg`, and reboot if nothing else helps.",
            details={"operation": "clean", "timeout": self._end_timeout + KILL_TIMEOUT_S},
        )

    @contextlib.contextmanager
    def _no_start(self) -> Iterator[None]:
        """Hold the lock under which keepers are started."""
        if not self._paths.runtime.is_dir():
            yield
            return
        deadline = time.monotonic() + START_TIMEOUT_S
        lock = os.open(self._paths.runtime, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while not _lock(lock):
                if time.monotonic() > deadline:
                    raise OperationTimeoutError(
                        "A keeper is being started and does not come up",
                        hint=f"{self._paths.keeper_log} says why; end it, then try again.",
                        details={"operation": "clean", "timeout": START_TIMEOUT_S},
                    )
                # flock knows no deadline.
                time.sleep(_RETRY_S)
            yield
        finally:
            os.close(lock)

    def _remove_directories(self) -> list[str]:
        removed = []
        for parent in (self._paths.sandboxes, self._paths.kernels):
            for path in sorted(parent.iterdir()) if parent.is_dir() else ():
                if _OUR_NAMES.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                    removed.append(str(path))
            with contextlib.suppress(OSError):
                parent.rmdir()
        for path in (self._paths.keeper_socket, self._paths.keeper_lock, self._paths.helper_socket):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                removed.append(str(path))
        return removed

    def _check_no_mounts(self) -> None:
        """Deleting through a mount would delete what is not ours."""
        below = os.fsencode(os.path.realpath(self._paths.runtime)) + b"/"
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            # Blanks and the like are written in octal there.
            point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4])
            if point.startswith(below):
                raise BackendError(
                    f"{os.fsdecode(point)} is still mounted, so nothing below {self._paths.runtime} was deleted",
                    hint=f"Unmount it (`umount {os.fsdecode(point)}`), then run `warmcell clean` again.",
                )


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
