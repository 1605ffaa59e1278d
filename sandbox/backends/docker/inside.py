"""A container's files as the host sees them, through its first process.

What lies below is the image's and the guest's: each step is taken by itself and never through a symbolic link, which
would lead to the host's own files.
"""

import contextlib
import os
import time
from pathlib import Path

EXEC_TIMEOUT_S = 3.0
PAUSE_S = 0.002
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def root(pid: int, *, timeout_s: float = EXEC_TIMEOUT_S) -> int:
    """A handle of its root directory. Blocks: an ordinary user may not look until the runtime has become our program.

    Raises:
        OSError: It has ended, or may not be looked into.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(PAUSE_S)  # No event tells of it.


def place(top: int, path: str) -> int:
    """A handle of a directory in it.

    Raises:
        OSError: There is none, or a link is on the way.
    """
    here = os.dup(top)
    for part in Path(path).parts[1:]:
        try:
            step = os.open(part, _STEP, dir_fd=here)
        finally:
            os.close(here)
        here = step
    return here


def directories(top: int, above: str, path: str, owner: tuple[int, int]) -> None:
    """Make the directories from `above` down to `path`, those that are not there yet, and give them to the guest.

    Raises:
        OSError: They cannot be made.
    """
    here = place(top, above)
    try:
        for part in Path(path).relative_to(above).parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=here)
                if os.getuid() == 0:
                    os.chown(part, *owner, dir_fd=here, follow_symlinks=False)
            step = os.open(part, _STEP, dir_fd=here)
            os.close(here)
            here = step
    finally:
        os.close(here)


def memory_events(pid: int) -> Path | None:
    """The file in which the kernel counts whom of its control group it has killed for memory, where one is seen."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            below = path.lstrip("/")
            if "memory" in controllers.split(","):
                found = Path("/sys/fs/cgroup/memory", below, "memory.oom_control")
            elif not controllers:
                found = Path("/sys/fs/cgroup", below, "memory.events")
            else:
                continue
            if found.is_file():
                return found
    return None
