"""Sandboxes as the helper knows them: by a descriptor of their first process, never by a name or a path."""

from __future__ import annotations

import contextlib
import os
import select

from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMESPACES = ("ipc", "uts", "net", "cgroup", "pid", "mnt")
"""In the order in which they are joined: after the last no file of the host can be reached any more."""
STATUS_MAX_BYTES = 1 << 20
"""The longest line is that of a user's groups, of whom Linux allows 65,536."""


class Place:
    """A sandbox that the caller may use. Everything in it is reached through descriptors taken at the check."""

    def __init__(self, pid: int, process: int, namespaces: dict[str, int]) -> None:
        self.pid = pid
        self.process = process
        """Of /proc/PID: names that process for ever, whoever gets its number."""
        self.namespaces = namespaces

    def close(self) -> None:
        """Let go of it."""
        for fd in (self.process, *self.namespaces.values()):
            os.close(fd)

    def processes(self, start: int | None = None) -> Iterator[int]:
        """Host pids of `start` (its first process) and of all below, parents first."""
        waiting = [self.pid if start is None else start]
        while waiting:
            pid = waiting.pop(0)
            yield pid
            waiting += children(pid)

    def find(self, guest_pid: int) -> int:
        """The host pid of what the guest knows as `guest_pid`.

        Raises:
            HelperError: There is none.
        """
        for pid in self.processes():
            if guest_pid_of(pid) == guest_pid:
                return pid
        raise HelperError("conflict", f"The sandbox has no process {guest_pid}", hint="It may have ended just now.")


def children(pid: int) -> list[int]:
    """Host pids of what `pid` has forked, by any of its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


def status(pid: int | str) -> dict[str, str]:
    """The fields of /proc/PID/status; empty if there is no such process."""
    fields = (line.partition(":") for line in _status(pid).split("\n") if line)
    return {name: value.strip() for name, _, value in fields}


def field(pid: int | str, name: str) -> str:
    """One field of /proc/PID/status, in a third of the time that all of them take; empty if there is none."""
    _, _, after = _status(pid).partition(f"\n{name}:")
    return after.partition("\n")[0].strip()


def _status(pid: int | str) -> str:
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # A guest may give a process any name, also one that is no text.
            return os.read(fd, STATUS_MAX_BYTES).decode("ascii", "surrogateescape")
        finally:
            os.close(fd)
    return ""


def guest_pid_of(pid: int) -> int:
    """As its innermost pid namespace counts; 0 if it has ended."""
    return int((field(pid, "NSpid") or "0").split()[-1])


def identify(pidfd: int, caller: int, owns: Callable[[int, int, int], bool] | None = None) -> Place:
    """The sandbox whose first process `pidfd` is, if it is one that `caller` may use.

    Args:
        pidfd: Of its first process.
        caller: Who asks.
        owns: Tells of a user, a process and when that began whether the helper has made it for that user.

    Raises:
        HelperError: It is not.
    """
    refusal = HelperError(
        "sandbox_not_found", "That is no sandbox of yours", hint="It may have ended, or belong to somebody else."
    )
    pid = _pid_of(pidfd)
    if pid <= 0:
        raise refusal
    namespaces: dict[str, int] = {}
    try:
        process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if _ended(pidfd):
            raise refusal
        # From here on `process` is the very process that the caller named: its number cannot have been used before
        # it ended, and opening anything below it fails once it has.
        found = status(f"self/fd/{process}")
        own = {name: os.readlink(f"/proc/self/ns/{name}") for name in (*NAMESPACES, "user")}
        theirs = {name: os.readlink(f"/proc/self/fd/{process}/ns/{name}") for name in own}
        first = found["NSpid"].split()
        # bubblewrap's outer process is the first of a pid namespace, too, but has the host's of all others but mounts.
        if len(first) < 2 or first[-1] != "1" or any(own[name] == theirs[name] for name in ("ipc", "pid", "mnt")):
            raise refusal
        if own["user"] != theirs["user"]:
            raise HelperError(
                "unsupported",
                "Memory snapshots need a sandbox that root has made; this one is in a user namespace of its own",
                hint="Have the helper make it (`systemctl enable --now warmcell-helper`), and start it anew. "
                "A container: use the system's engine (c.Warmcell.docker_host), without userns-remap.",
            )
        if caller not in (0, int(found["Uid"].split()[0])):
            began = _began(process)
            if owns is None or not owns(caller, pid, began):
                raise refusal
        for name in NAMESPACES:
            if theirs[name] != own[name]:
                namespaces[name] = os.open(f"ns/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise refusal from error
    if _ended(pidfd):
        raise refusal
    return Place(pid, process, namespaces)


def _pid_of(pidfd: int) -> int:
    try:
        with open(f"/proc/self/fdinfo/{pidfd}") as file:
            for line in file:
                if line.startswith("Pid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return 0


def _began(process: int) -> int:
    """When the process began whose directory in /proc is open, in clock ticks since boot."""
    with open(os.open("stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)) as file:
        return int(file.read().rpartition(")")[2].split()[19])


def _ended(pidfd: int) -> bool:
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    return bool(waiting.poll(0))
