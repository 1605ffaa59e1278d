"""What a result says of the machine that it was made on: enough to read it, nothing that names it."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("ipykernel", "jupyter_client", "jupyter_server", "numpy", "pandas", "pyzmq", "torch")

BUSY_LOAD_PER_CORE = 0.5
"""Above it something else is running, and numbers are not worth keeping."""


def describe() -> dict[str, Any]:
    """Processor, cores, memory, Linux, Python and packages."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "linux": platform.release(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The commit that is checked out, with a + where something is not committed; empty outside a repository."""
    top = Path(__file__).parent.parent
    try:
        said = [
            subprocess.run(["git", "-C", str(top), *what], capture_output=True, text=True, check=True).stdout.strip()
            for what in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said[0] + ("+" if said[1] else "")


def load() -> float:
    """Processes that wanted to run, on average over the last minute."""
    return round(os.getloadavg()[0], 2)


def is_busy() -> bool:
    """Whether something else is running."""
    return load() > BUSY_LOAD_PER_CORE * len(os.sched_getaffinity(0))


def sentence(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    packages = machine["packages"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, Linux {machine['linux']}, "
        f"Python {machine['python']}, ipykernel {packages['ipykernel']}, torch {packages['torch']}"
    )


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
