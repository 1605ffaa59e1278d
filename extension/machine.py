"""What of the machine and its packages matters here, read without changing anything."""

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from warmcell.sandbox.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Version(Wire):
    """A component that is installed, and the oldest version of it that will do."""

    name: str
    found: str
    required: str
    ok: bool
    why: str
    """What an older one lacks."""
    severity: Literal["warning", "note"] = "warning"
    hint: str = ""

    @property
    def message(self) -> str:
        """What is wrong with an old one."""
        return f"{self.name} {self.found} is older than {self.required}: {self.why}"


# Package to the oldest version without the flaw, and the flaw. Those that are not installed are not told of.
FLOORS: Mapping[str, tuple[str, str]] = {
    "jupyter-server": ("2.18.0", "files outside the root folder can be read (CVE-2026-35397, CVE-2026-40934)"),
    "jupyter-server-proxy": ("4.1.1", "websockets are proxied without authentication (CVE-2024-28179)"),
    "jupyterhub": ("5.4.5", "requests across sites are not refused (CVE-2026-40864)"),
}
PARKING_DRIVER = "575.57.08"


def versions() -> tuple[Version, ...]:
    """The installed ones of those packages whose version matters. Blocks."""
    found = []
    for name, (required, why) in FLOORS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        found.append(
            Version(
                name=name,
                found=installed,
                required=required,
                ok=at_least(installed, required),
                why=why,
                hint=f"pip install --upgrade '{name}>={required}'",
            )
        )
    return tuple(found)


def driver_version(found: str) -> Version:
    """The NVIDIA driver's version, held against the oldest that can park a process's GPU memory."""
    return Version(
        name="NVIDIA driver",
        found=found,
        required=PARKING_DRIVER,
        ok=at_least(found, PARKING_DRIVER),
        why="kernels run, but their GPU memory cannot be set aside for others",
        severity="note",
        hint=f"Install driver {PARKING_DRIVER} or later, better 580 or later.",
    )


def at_least(found: str, required: str) -> bool:
    """Whether a dotted version is not older; what follows the numbers ("2.18.0rc1") is not looked at."""
    return _numbers(found) >= _numbers(required)


def own_version() -> str:
    """Warmcell's own."""
    try:
        return version("warmcell")
    except PackageNotFoundError:
        return "unknown"


def user() -> str:
    """Name of the user, or the number where there is no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def cgroups(*, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Which control groups are mounted, with their controllers: "v2 (cpu, memory, pids)"."""
    controllers: dict[str, set[str]] = {}
    for line in _read(mounts).splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = (*after.split(" ", 2), "", "")[:3]
        if kind == "cgroup2":
            available = _read(Path(before.split()[4]) / "cgroup.controllers").split()
            controllers.setdefault("v2", set()).update(available)
        elif kind == "cgroup":
            named = set(options.rpartition(" ")[2].split(",")) & {"cpu", "memory", "pids"}
            controllers.setdefault("v1", set()).update(named)
    told = []
    for generation, names in sorted(controllers.items(), reverse=True):
        used = sorted(names & {"cpu", "memory", "pids"})
        told.append(f"{generation} ({', '.join(used) or 'no controllers'})")
    return " and ".join(told) or "none"


def user_namespaces(*, as_root: bool, settings: Path = Path("/proc/sys")) -> str:
    """Whether ordinary users may make user namespaces, as far as the settings tell."""
    if _read(settings / "user/max_user_namespaces").strip() in {"0", "1"}:
        verdict = "forbidden by user.max_user_namespaces"
    elif _read(settings / "kernel/unprivileged_userns_clone").strip() == "0":
        verdict = "forbidden by kernel.unprivileged_userns_clone"
    elif _read(settings / "kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        verdict = "restricted by kernel.apparmor_restrict_unprivileged_userns"
    else:
        verdict = "allowed"
    return f"{verdict} (not needed as root)" if as_root else verdict


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
