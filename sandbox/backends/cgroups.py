"""Caps on memory, processes and processor time, by the kernel's control groups.

Version 2 where our own part of the tree can be written (by root, or by a user to whom systemd delegates one), version 1
as root where only that can be. Where neither can, a limit is reported as not enforced, with the cure.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from warmcell.sandbox.backends.processes import keeper_mark, start_time
from warmcell.sandbox.models import Limits, LimitStatus, SandboxId

PREFIX = "warmcell-"
CONTROLLERS = ("memory", "pids", "cpu")
PERIOD_US = 100_000
QUOTA_MIN_US = 1000
KEEPER_LEAF = "keeper"
"""Where a keeper moves itself, since a group that has members cannot hand controllers on to groups below it."""

_LOG_IN_AGAIN = (
    "Let systemd delegate control groups, as root: printf '[Service]\\nDelegate=cpu memory pids\\n' | "
    "install -D /dev/stdin /etc/systemd/system/user@.service.d/warmcell.conf && systemctl daemon-reload, "
    "then log in again."
)
_OWN_GROUP = "Start the keeper in a group of its own: systemd-run --user --scope -p Delegate=yes"
_USE_V2 = "Boot with systemd.unified_cgroup_hierarchy=1, or run the keeper as root."
_ROOT_CONTAINER = "In a container, give it a writable /sys/fs/cgroup: docker run --cgroupns=private --privileged …"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups of ours go for some controllers."""

    parent: Path
    version: int


class Cgroup:
    """The control group, or the groups under version 1, of one sandbox."""

    def __init__(self, directories: Mapping[str, Path], version: int) -> None:
        self._directories = directories
        self._version = version

    @property
    def entrances(self) -> Sequence[Path]:
        """Files into which a process writes 0 to join."""
        return [directory / "cgroup.procs" for directory in self._unique]

    def pids(self) -> tuple[int, ...]:
        """Who is in it."""
        return tuple(sorted({pid for directory in self._unique for pid in _members(directory)}))

    def oom_kills(self) -> int:
        """How many of its processes were killed for memory; 0 where no memory group is."""
        directory = self._directories.get("memory")
        if directory is None:
            return 0
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        return _counter(directory / name, "oom_kill")

    def kill(self) -> None:
        """Kill all members, those included that are being started meanwhile."""
        for directory in self._unique:
            if self._version == 2 and (directory / "cgroup.kill").exists():
                _write(directory / "cgroup.kill", "1")
                continue
            for pid in _members(directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)

    async def remove(self) -> None:
        """Kill all members and remove it. Idempotent; waits as long as members do not die."""
        pause_s = 0.001
        while not await asyncio.to_thread(self.remove_now):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    def remove_within(self, timeout: float) -> bool:
        """`remove`, for who has no event loop; False if members are left after `timeout` seconds. Blocks."""
        deadline = time.monotonic() + timeout
        while not self.remove_now():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def remove_now(self) -> bool:
        """Kill all members and try to remove it; False if some are not gone yet. Blocks."""
        gone = True
        for directory in self._unique:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
                self.kill()
                gone = False
        return gone

    @cached_property
    def _unique(self) -> list[Path]:
        return list(dict.fromkeys(self._directories.values()))


class Cgroups:
    """What this machine lets us cap, found out once."""

    async def create(self, sandbox_id: SandboxId, limits: Limits) -> tuple[Cgroup | None, dict[str, LimitStatus]]:
        """A group with these limits, and which of them it holds. None: no group can be made here."""
        return await asyncio.to_thread(self._create, sandbox_id, limits)

    def statuses(self, limits: Limits) -> dict[str, LimitStatus]:
        """What of `limits` a group would hold. Blocks."""
        wanted = {"memory": limits.memory_bytes, "pids": limits.pids, "cpu": limits.cpus}
        return {
            name: LimitStatus(value=value, enforced=name in self._hierarchies, why=self._why.get(name, ""))
            for name, value in wanted.items()
        }

    def describe(self) -> dict[str, str]:
        """One line per controller, for doctor. Blocks."""
        return {
            name: f"enforced (cgroup v{self._hierarchies[name].version})"
            if name in self._hierarchies
            else f"not enforced: {self._why[name]}"
            for name in CONTROLLERS
        }

    def parents(self) -> Sequence[Path]:
        """Directories in which groups of ours may lie. Blocks."""
        return list(dict.fromkeys(hierarchy.parent for hierarchy in self._hierarchies.values()))

    def _create(self, sandbox_id: SandboxId, limits: Limits) -> tuple[Cgroup | None, dict[str, LimitStatus]]:
        statuses = self.statuses(limits)
        held = {name: self._hierarchies[name] for name, status in statuses.items() if status.enforced}
        if held and next(iter(held.values())).version == 1:
            held = {name: hierarchy for name, hierarchy in held.items() if statuses[name].value is not None}
        if not held:
            return None, statuses
        directories = {name: hierarchy.parent / _name(sandbox_id) for name, hierarchy in held.items()}
        version = next(iter(held.values())).version
        group = Cgroup(directories, version)
        try:
            for directory in dict.fromkeys(directories.values()):
                directory.mkdir()
            for name, directory in directories.items():
                value = statuses[name].value
                if value is not None:
                    for file, content in _settings(name, value, version).items():
                        if file.startswith("?"):
                            _try_write(directory / file[1:], content)
                        else:
                            _write(directory / file, content)
        except OSError as error:
            group.remove_now()
            why = f"{error.filename}: {error.strerror}"
            return None, {
                name: LimitStatus(value=status.value, enforced=False, why=why) for name, status in statuses.items()
            }
        return group, statuses

    @cached_property
    def _survey(self) -> tuple[dict[str, Hierarchy], dict[str, str]]:
        return survey()

    @property
    def _hierarchies(self) -> dict[str, Hierarchy]:
        return self._survey[0]

    @property
    def _why(self) -> dict[str, str]:
        return self._survey[1]


def survey(
    *, mounts: Path = Path("/proc/self/mountinfo"), own: Path = Path("/proc/self/cgroup")
) -> tuple[dict[str, Hierarchy], dict[str, str]]:
    """Where each controller can be used, and why not where it cannot. Blocks."""
    memberships = _memberships(own)
    found: dict[str, Hierarchy] = {}
    why: dict[str, str] = {}
    as_root = os.getuid() == 0
    for mount_point, root, kind, options in _mounts(mounts):
        if kind == "cgroup2":
            parent, reason = _second_version(mount_point, root, memberships.get("", "/"), as_root=as_root)
            for name in CONTROLLERS:
                if parent is not None and name in _words(parent / "cgroup.subtree_control"):
                    found.setdefault(name, Hierarchy(parent, 2))
                elif name in _words(mount_point / "cgroup.controllers"):
                    why.setdefault(name, reason or f"{parent} has no {name} controller. {_LOG_IN_AGAIN}")
        else:
            for name in set(CONTROLLERS) & options:
                parent = _inside(mount_point, root, memberships.get(name, "/"))
                if os.access(parent, os.W_OK):
                    found.setdefault(name, Hierarchy(parent, 1))
                else:
                    why.setdefault(name, f"cgroup v1 can be written by root alone. {_USE_V2}")
    for name in CONTROLLERS:
        if name not in found:
            why.setdefault(name, f"no {name} control group is mounted. {_ROOT_CONTAINER}")
    return found, {name: reason for name, reason in why.items() if name not in found}


def _second_version(mount_point: Path, root: str, membership: str, *, as_root: bool) -> tuple[Path | None, str]:
    """The group in which ours can be made, its controllers handed on; or why there is none."""
    own = _inside(mount_point, root, membership)
    candidates = [mount_point, own] if as_root else [own.parent if own.name == KEEPER_LEAF else own]
    reason = ""
    for parent in candidates:
        if not os.access(parent, os.W_OK) or not os.access(parent / "cgroup.subtree_control", os.W_OK):
            reason = reason or (_ROOT_CONTAINER if as_root else f"{parent} belongs to root. {_LOG_IN_AGAIN}")
            continue
        if _hand_on(parent):
            return parent, ""
        reason = f"other processes are in {parent}. {_OWN_GROUP}"
    return None, reason


def _hand_on(parent: Path) -> bool:
    """Let groups below `parent` have controllers; False if that cannot be."""
    available = [name for name in CONTROLLERS if name in _words(parent / "cgroup.controllers")]
    missing = [name for name in available if name not in _words(parent / "cgroup.subtree_control")]
    if not missing:
        return bool(available)
    if _members(parent) == [os.getpid()]:
        leaf = parent / KEEPER_LEAF
        with contextlib.suppress(OSError):
            leaf.mkdir(exist_ok=True)
            _write(leaf / "cgroup.procs", "0")
    for name in missing:
        with contextlib.suppress(OSError):
            _write(parent / "cgroup.subtree_control", f"+{name}")
    return any(name in _words(parent / "cgroup.subtree_control") for name in available)


def leftovers(parents: Sequence[Path]) -> list[Cgroup]:
    """Groups whose keeper is gone. Blocks."""
    found = []
    for parent in parents:
        for directory in sorted(parent.glob(f"{PREFIX}*")):
            owner, _, _ = directory.name.removeprefix(PREFIX).partition("-")
            pid, _, began = owner.partition(".")
            if pid.isdigit() and began.isdigit() and start_time(int(pid)) != int(began):
                version = 2 if (directory / "cgroup.controllers").exists() else 1
                found.append(Cgroup({"": directory}, version))
    return found


def _name(sandbox_id: SandboxId) -> str:
    """Says whose it is, so that what a killed keeper leaves can be told from what another one has."""
    return f"{PREFIX}{keeper_mark()}-{sandbox_id}"


def _settings(controller: str, value: float, version: int) -> dict[str, str]:
    """File to content; a leading ? marks those that not every kernel has."""
    quota = max(QUOTA_MIN_US, int(value * PERIOD_US))
    if controller == "memory" and version == 2:
        return {"memory.max": str(int(value)), "?memory.swap.max": "0"}
    if controller == "memory":
        return {"memory.limit_in_bytes": str(int(value)), "?memory.memsw.limit_in_bytes": str(int(value))}
    if controller == "pids":
        return {"pids.max": str(int(value))}
    if version == 2:
        return {"cpu.max": f"{quota} {PERIOD_US}"}
    return {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(quota)}


def _mounts(path: Path) -> list[tuple[Path, str, str, set[str]]]:
    """Mounted hierarchies: mount point, root within the hierarchy, kind, options."""
    found = []
    for line in path.read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if kinds[0] in ("cgroup", "cgroup2"):
            found.append((Path(fields[4]), fields[3], kinds[0], set(kinds[2].split(","))))
    return found


def _memberships(path: Path) -> dict[str, str]:
    """Controller to the path of our own group; "" for version 2."""
    found = {}
    for line in path.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), group))
    return found


def _inside(mount_point: Path, root: str, group: str) -> Path:
    """The directory of a group below a mount that may show only a part of the hierarchy."""
    below = os.path.relpath(group, root) if root != "/" else group.lstrip("/")
    path = mount_point / below
    return path if not below.startswith("..") and path.is_dir() else mount_point


def _members(directory: Path) -> list[int]:
    try:
        return [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _counter(path: Path, name: str) -> int:
    words = _words(path)
    return next((int(value) for key, value in itertools.pairwise(words) if key == name), 0)


def _write(path: Path, content: str) -> None:
    with path.open("w") as file:
        file.write(content)


def _try_write(path: Path, content: str) -> None:
    with contextlib.suppress(OSError):
        _write(path, content)
