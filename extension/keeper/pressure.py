"""How much memory the machine, or the control group that the keeper is in, still has."""

import re
from dataclasses import dataclass
from pathlib import Path

STALLED_PCT = 20.0
"""Share of the last ten seconds in which every process waited for memory: then it is short whatever else is said."""

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory that can be used."""

    available_bytes: int
    total_bytes: int
    stalled_pct: float = 0.0

    def short(self, below: float) -> bool:
        """Whether less than `below` is left: a fraction of all where that is under 1, else GiB. 0: never."""
        if below <= 0:
            return False
        least = below * self.total_bytes if below < 1 else below * 2**30
        return self.available_bytes < least or self.stalled_pct >= STALLED_PCT


def look(*, proc: Path = Path("/proc")) -> Room:
    """The tightest of what holds for this process. Blocks for as long as a few small files take."""
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(proc / "meminfo"), re.M))
    total = int(told.get("MemTotal", 0)) * 1024
    available = int(told.get("MemAvailable", 0)) * 1024
    for group in _groups(proc):
        limit, used = _number(group, "memory.max", "memory.limit_in_bytes"), _used(group)
        if limit is not None and used is not None and limit < min(total, _UNLIMITED):
            total, available = min(total, limit), min(available, max(0, limit - used))
    return Room(available_bytes=available, total_bytes=total, stalled_pct=_stalled(proc))


def _groups(proc: Path) -> list[Path]:
    """Directories of the memory group that this process is in, and of those above it."""
    mounts: dict[str, tuple[Path, str]] = {}
    for line in _read(proc / "self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = (*after.split(" ", 2), "", "")[:3]
        root, place = before.split()[3:5]
        if kind == "cgroup2":
            mounts["v2"] = Path(place), root
        elif kind == "cgroup" and "memory" in options.rpartition(" ")[2].split(","):
            mounts["v1"] = Path(place), root
    found: list[Path] = []
    for line in _read(proc / "self/cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        generation = "v2" if number == "0" else "v1" if "memory" in controllers.split(",") else ""
        if generation not in mounts:
            continue
        mount, root = mounts[generation]
        here = mount / path.removeprefix(root if root != "/" else "").lstrip("/")
        while here != mount.parent and here != here.parent:
            found.append(here)
            here = here.parent
    return found


def _used(group: Path) -> int | None:
    """What is used and cannot be had back by dropping caches."""
    used = _number(group, "memory.current", "memory.usage_in_bytes")
    if used is None:
        return None
    caches = dict(re.findall(r"^(\w+) (\d+)$", _read(group / "memory.stat"), re.M))
    return used - int(caches.get("total_inactive_file") or caches.get("inactive_file") or 0)


def _number(group: Path, *names: str) -> int | None:
    for name in names:
        text = _read(group / name).strip()
        if text.isdigit():
            return int(text)
    return None


def _stalled(proc: Path) -> float:
    found = re.search(r"^full avg10=([\d.]+)", _read(proc / "pressure/memory"), re.M)
    return float(found[1]) if found else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
