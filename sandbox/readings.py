"""What processes, and the machine, use now, as the kernel's own files say it. All of it blocks for milliseconds."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.wire import Wire

PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Wire):
    """What some processes use. Processor time only grows while they live, so that two readings make a rate."""

    cpu_s: float
    """Processor seconds that they, and children of theirs that have ended, have had."""
    memory_bytes: int
    """Memory that is theirs; of what several processes share the part that is each one's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReading(Wire):
    """What all of the machine uses."""

    cpus: int
    """Processors that this process may use."""
    cpu_s: float
    """Processor seconds since boot in which one was busy, over all of them."""
    memory_used_bytes: int
    memory_total_bytes: int


def read(pids: Sequence[int], *, proc: Path = PROC) -> Reading:
    """What these processes use. One that ends meanwhile counts for nothing."""
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    ticks = memory = 0
    for pid in pids:
        here = proc / str(pid)
        try:
            fields = (here / "stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
            memory += _share(here) or int((here / "statm").read_text().split()[1]) * page
        except (OSError, ValueError, IndexError):
            continue
    return Reading(cpu_s=ticks / tick, memory_bytes=memory)


def read_machine(*, proc: Path = PROC) -> MachineReading:
    """What the machine uses. What can be had back by dropping caches is not used."""
    first = (proc / "stat").read_text().partition("\n")[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, first[:8])
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB$", (proc / "meminfo").read_text(), re.M))
    total = int(told["MemTotal"]) * 1024
    return MachineReading(
        cpus=len(os.sched_getaffinity(0)),
        cpu_s=(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
        memory_used_bytes=total - int(told["MemAvailable"]) * 1024,
        memory_total_bytes=total,
    )


def _share(here: Path) -> int:
    """Proportional set size of a process; 0 where it may not be read, as of another user's."""
    try:
        text = (here / "smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB$", text, re.M)
    return int(found[1]) * 1024 if found else 0
