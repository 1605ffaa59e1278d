"""A process that is no child: how it is signalled, and how it ended."""

from __future__ import annotations

import os

from .loop import exit_code

_GET_INFO = 0xC048FF0B
"""The request PIDFD_GET_INFO for a structure of 72 bytes."""
_INFO_BYTES = 72
_EXIT = 1 << 3
_EXIT_CODE_AT = 60
_STAT_EXIT_CODE = 49
"""Where /proc/PID/stat has it, counted from the state, which follows the name."""

UNKNOWN = -1


def signal_adopted(pidfd: int, pid: int, signum: int, *, group: bool) -> None:
    """Signal the process, and its group where it leads one.

    Raises:
        OSError: It is gone.
    """
    import _signal

    _signal.pidfd_send_signal(pidfd, signum if not group else 0)
    if group:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signum)
        else:
            _signal.pidfd_send_signal(pidfd, signum)


def exit_code_of(pidfd: int, pid: int) -> int:
    """The exit code of a process that has ended, 128 + n for signal n; -1 where the system does not tell."""
    for look in (_told_by_system, _told_by_remains, _told_by_system):
        status = look(pidfd, pid)
        if status is not None:
            return exit_code(status)
    return UNKNOWN


def _told_by_system(pidfd: int, pid: int) -> int | None:
    """Its wait status, of one that was reaped (Linux 6.15 and later)."""
    import fcntl

    info = bytearray(_INFO_BYTES)
    info[:8] = _EXIT.to_bytes(8, "little")
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
    except OSError:
        return None
    if not int.from_bytes(info[:8], "little") & _EXIT:
        return None
    return int.from_bytes(info[_EXIT_CODE_AT : _EXIT_CODE_AT + 4], "little")


def _told_by_remains(pidfd: int, pid: int) -> int | None:
    """Its wait status, of one that nobody has reaped yet."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return None
    if len(fields) <= _STAT_EXIT_CODE or fields[0] not in (b"Z", b"X"):
        return None
    return int(fields[_STAT_EXIT_CODE])
