"""What of root's rights the helper's work needs."""

from __future__ import annotations

NEEDED = {
    "AUDIT_WRITE": 29,
    "CHECKPOINT_RESTORE": 40,
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "DAC_READ_SEARCH": 2,
    "FOWNER": 3,
    "FSETID": 4,
    "IPC_OWNER": 15,
    "KILL": 5,
    "MKNOD": 27,
    "NET_ADMIN": 12,
    "SETFCAP": 31,
    "SETGID": 6,
    "SETPCAP": 8,
    "SETUID": 7,
    "SYS_ADMIN": 21,
    "SYS_CHROOT": 18,
    "SYS_NICE": 23,
    "SYS_PTRACE": 19,
    "SYS_RESOURCE": 24,
    "SYS_TIME": 25,
}
"""Capabilities by name, with their numbers."""
