"""Who is behind a pid or a uid, as far as this user may see it."""

import os
import pwd
import re
from pathlib import Path

from warmcell.sandbox.gpus.base import GpuProcess


def describe(pid: int, *, memory_bytes: int | None = None) -> GpuProcess:
    """A process with its user and command; the bare pid where it cannot be seen."""
    directory = Path("/proc") / str(pid)
    try:
        uid = os.stat(directory).st_uid
        command = (directory / "comm").read_text(errors="replace").strip()
    except OSError:
        return GpuProcess(pid=pid, memory_bytes=memory_bytes)
    return GpuProcess(pid=pid, user=user_name(uid), command=command, memory_bytes=memory_bytes)


def user_of(pid: int) -> int | None:
    """Its uid; None where there is no such process, or it cannot be seen."""
    try:
        status = (Path("/proc") / str(pid) / "status").read_text()
    except OSError:
        return None
    found = re.search(r"^Uid:\s+(\d+)", status, re.M)
    return int(found[1]) if found else None


def user_name(uid: int) -> str:
    """The user's login name, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
