"""What a result says of the machine that it was made on: enough to read it, nothing that names it."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.server import BenchmarkError

PACKAGES = ("ipykernel", "jupyter_client", "jupyter_server", "numpy", "pandas", "pyzmq", "torch")

NEEDED = ("ipykernel", "numpy", "pandas", "torch")
"""What kernels import while they are measured."""

ASK = """
import importlib.metadata, json, platform, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps([platform.python_version(), found]))
"""

BUSY_PCT = 10.0
"""Above it something else is running, and numbers are not worth keeping."""

LOOK_S = 3.0


def describe(python: str = "") -> dict[str, Any]:
    """Processor, cores, memory, Linux, Python and packages: of that interpreter, or of this environment."""
    version, found = packages(python or sys.executable)
    return {
        "cpu": field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "linux": platform.release(),
        "python": version,
        "packages": found,
    }


def packages(python: str) -> tuple[str, dict[str, str]]:
    """Version of an interpreter, and of each package of its environment that a result names.

    Raises:
        BenchmarkError: It does not run, or lacks what is measured.
    """
    try:
        said = subprocess.run([python, "-I", "-c", ASK, *PACKAGES], capture_output=True, text=True, check=True).stdout
        version, found = json.loads(said)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise BenchmarkError(f"{python} is no interpreter that runs ({type(error).__name__})") from error
    if missing := [name for name in NEEDED if name not in found]:
        raise BenchmarkError(
            f"its environment lacks what is measured. Run: {python} -m pip install {' '.join(missing)}"
        )
    return version, found


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


def busy_pct() -> float:
    """How much of all processors others use, in percent: looked at for three seconds in which nothing of ours runs.

    The load average would still tell of ourselves a minute after a measurement.
    """
    before = _processor_ticks()
    time.sleep(LOOK_S)
    total, idle = (now - then for now, then in zip(_processor_ticks(), before, strict=True))
    return round(100 * (1 - idle / total), 1)


def sentence(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    packages = machine["packages"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, Linux {machine['linux']}, "
        f"Python {machine['python']}, ipykernel {packages['ipykernel']}, torch {packages['torch']}"
    )


def _processor_ticks() -> tuple[int, int]:
    """All ticks of the processors so far, and those in which there was nothing to do."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def field(path: str, name: str) -> str:
    """The first of these fields in a file of `name: value` lines, empty if there is none."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
