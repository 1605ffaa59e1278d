"""What a sandbox uses, read from /proc on the host: the processes that are in it, whatever they say themselves."""

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.pool import memory_shares

TICKS = os.sysconf("SC_CLK_TCK")
UTIME, STIME, CUTIME, CSTIME = 11, 12, 13, 14
"""Fields of /proc/PID/stat, counted from the one after the name."""


def measure(box: LiveSandbox) -> dict[str, Any]:
    """Memory (each shared page by its share), processor time and processes, with their limits. Blocks shortly."""
    pids = box.processes
    limits = box.info.limits
    memory, cached = memory_shares(pids, "Pss", "Pss_File")
    return {
        "at": time.time(),
        "memory_bytes": memory,
        "cache_bytes": cached,
        "disk_used_bytes": None,
        "memory_limit_bytes": _limit(limits, "memory"),
        "cpu_s": round(sum(_cpu_ticks(pid) for pid in pids) / TICKS, 2),
        "cpus": _limit(limits, "cpu"),
        "processes": len(pids),
        "pids_limit": _limit(limits, "pids"),
        "network": dataclasses.asdict(box.tally),
    }


def _limit(limits: Any, name: str) -> float | None:
    found = limits.get(name)
    return None if found is None else found.value


def _cpu_ticks(pid: int) -> int:
    """Of a process and of its children that have ended."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(fields[one]) for one in (UTIME, STIME, CUTIME, CSTIME))
    return 0
