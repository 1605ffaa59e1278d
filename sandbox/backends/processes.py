"""Looking at processes of this machine."""

import os
from collections.abc import Collection
from pathlib import Path


def descendants(pid: int) -> tuple[int, ...]:
    """Host pids of all living descendants of `pid`, parents before children."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        here = waiting.pop(0)
        try:
            threads = os.listdir(f"/proc/{here}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                children = _told(f"/proc/{here}/task/{thread}/children").split()
            except OSError:
                continue
            living = [child for child in map(int, children) if not has_ended(child)]
            found += living
            waiting += living
    return tuple(found)


def _told(path: str) -> str:
    """What a file of /proc says. Not by `Path`, which would take longer than the file.

    Raises:
        OSError: The process has ended.
    """
    with open(path, "rb", buffering=0) as file:
        said = b""
        while piece := file.read(65536):
            said += piece
    return said.decode(errors="replace")


def is_bare(first: Collection[int], living: Collection[int], *, fork_server: bool) -> bool:
    """Whether no process is left but those that a sandbox began with.

    Args:
        first: Those; what has lost its parent is a child of one of them.
        living: All that are there now.
        fork_server: Its init keeps one: that, and the one kernel that comes up there, may be there too.
    """
    further = [pid for pid in living if pid not in first]
    if not fork_server:
        return not further
    servers = [pid for pid in further if parent_of(pid) in first]
    return len(servers) <= 1 and len(further) <= 2 and all(parent_of(pid) in (*first, *servers) for pid in further)


def parent_of(pid: int) -> int:
    """Host pid of its parent; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def only_child(pid: int) -> int:
    """Host pid of the first child of a process with one thread.

    Raises:
        ProcessLookupError: It has none.
    """
    children = children_of(pid)
    if not children:
        raise ProcessLookupError(pid)
    return children[0]


def children_of(pid: int) -> list[int]:
    """Host pids of the children of a process with one thread; none where it has ended."""
    try:
        return [int(child) for child in _told(f"/proc/{pid}/task/{pid}/children").split()]
    except OSError:
        return []


def words_of(pid: int) -> list[bytes]:
    """Its command line as it is now; one empty word where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; with its pid it names one process.

    None: there is none, or it has ended and only waits to be reaped.
    """
    try:
        fields = _told(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def bearing(name: str) -> list[tuple[int, str]]:
    """Host pids of the living processes of this user that were started with the variable `name`, and its value."""
    wanted = f"{name}=".encode()
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # It ended while we looked, or is somebody else's.
        found += [(pid, os.fsdecode(one[len(wanted) :])) for one in variables if one.startswith(wanted)]
    return found


def keeper_mark() -> str:
    """Names this process for as long as the machine is up: `PID.START`."""
    return f"{os.getpid()}.{start_time(os.getpid())}"


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits to be reaped: where its first thread alone has ended, others work on."""
    try:
        fields = _told(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return fields[0] in "ZX" and int(fields[17]) <= 1
    except OSError:
        return True
