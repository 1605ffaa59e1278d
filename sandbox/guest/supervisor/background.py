"""What runs in the sandbox besides its kernels: servers, daemons and commands that are nobody's child, or init's.

A saved kernel comes back without them, so who saves it asks.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from typing import Any

COMMANDS_MAX = 10
COMMAND_BYTES = 200
"""More of a command line is not looked at."""
_PARENT, _USER_TIME, _CHILDREN_SYSTEM_TIME, _START = 1, 11, 14, 19
"""Where /proc/PID/stat has them, counted from the state, which follows the name."""
_LISTENS = b"0A"


def background(*, guest: str, own: Collection[int], alone: bool) -> dict[str, Any]:
    """What runs, the longest running first.

    Args:
        guest: Our own programs' directory.
        own: Init's other processes that are no user's; what is below them is neither.
        alone: All processes that are seen are the sandbox's; else those are that descend from init.
    """
    found = dict(_all())
    init = os.getpid()
    pids = [
        pid
        for pid in found
        if pid not in (1, init) and (alone or _is_below(pid, {init}, found)) and not _is_below(pid, own, found)
    ]
    pids.sort(key=lambda pid: int(found[pid][_START]))
    commands = [command for command in dict.fromkeys(_command(pid, guest) for pid in pids) if command]
    ticks = sum(int(field) for pid in pids for field in found[pid][_USER_TIME : _CHILDREN_SYSTEM_TIME + 1])
    return {
        "commands": commands[:COMMANDS_MAX],
        "more": len(commands[COMMANDS_MAX:]),
        "listens": _any_listens(pids),
        "cpu_s": ticks / os.sysconf("SC_CLK_TCK"),
    }


def _all() -> Iterator[tuple[int, list[bytes]]]:
    """Each living process of the sandbox, with what its `stat` says."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _read(f"/proc/{name}/stat").rpartition(b") ")[2].split()
            if fields and fields[0] not in (b"Z", b"X"):
                yield int(name), fields


def _is_below(pid: int, tops: Collection[int], found: dict[int, list[bytes]]) -> bool:
    """Whether it is one of those, or descends from one."""
    seen: set[int] = set()
    while pid in found and pid not in seen:  # A number may be another's by now, so that they go round.
        if pid in tops:
            return True
        seen.add(pid)
        pid = int(found[pid][_PARENT])
    return False


def _command(pid: int, guest: str) -> str:
    """Its command line. A fork of a kernel has ours, which says nothing to anybody."""
    words = _read(f"/proc/{pid}/cmdline", COMMAND_BYTES).rstrip(b"\0").split(b"\0")
    if is_ours(map(os.fsdecode, words), guest):
        words = [os.path.basename(words[0])]
    return b" ".join(words).decode("utf-8", "replace").strip()


def is_ours(words: Iterable[str], guest: str) -> bool:
    """Whether a command line is of one of our own programs."""
    return any(word.startswith(f"{guest}/") for word in words)


def _any_listens(pids: Iterable[int]) -> bool:
    """Whether any waits for connections at a TCP port."""
    listening = {
        b"socket:[%s]" % fields[9]
        for table in ("tcp", "tcp6")
        for fields in map(bytes.split, _read(f"/proc/self/net/{table}").splitlines()[1:])
        if len(fields) > 9 and fields[3] == _LISTENS
    }
    return bool(listening) and any(target in listening for pid in pids for target in _open_files(pid))


def _open_files(pid: int) -> Iterator[bytes]:
    directory = b"/proc/%d/fd" % pid
    try:
        names = os.listdir(directory)
    except OSError:
        return  # It has ended, or is another user's.
    for name in names:
        try:
            yield os.readlink(directory + b"/" + name)
        except OSError:
            continue


def _read(path: str, size: int = -1) -> bytes:
    """What a file of /proc says; nothing where its process has ended."""
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError:
        return b""
