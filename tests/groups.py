"""A control group of this run's own, below which its keepers make those of their sandboxes.

So runs of the tests side by side, and the keepers of whoever works on this machine, cannot be taken for what a test
has left behind.
"""

import contextlib
import os
import time
from pathlib import Path

from warmcell.sandbox.backends.cgroups.survey import survey

EMPTY_TIMEOUT_S = 30.0
EVERYWHERE = Path("/sys/fs/cgroup")


def enter() -> list[Path]:
    """Move this process into new groups, one for each hierarchy of version 1 that it may write; returns them.

    None under version 2, where root's groups lie at the top whoever makes them, and for ordinary users.
    """
    made = []
    for parent in {found.parent for found in survey()[0].values() if found.version == 1}:
        group = parent / f"tests-{os.getpid()}"
        group.mkdir()
        _move(group)
        made.append(group)
    return made


def leave(groups: list[Path]) -> None:
    """Move this process out of them again and remove them; one in which somebody stays is left."""
    deadline = time.monotonic() + EMPTY_TIMEOUT_S
    for group in groups:
        _move(group.parent)
        while group.is_dir() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def _move(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
