"""Where on this machine control groups can be made, and why not where they cannot."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.backends.cgroups import scope
from warmcell.sandbox.backends.cgroups.group import members, words, write

CONTROLLERS = ("memory", "pids", "cpu")
KEEPER_LEAF = "keeper"
"""Where a keeper moves itself, since a group that has members cannot hand controllers on to groups below it."""

_DELEGATE = (
    "Let systemd delegate control groups, as root: printf '[Service]\\nDelegate=cpu memory pids\\n' | "
    "install -D /dev/stdin /etc/systemd/system/user@.service.d/warmcell.conf && systemctl daemon-reload, "
    "then log in again."
)
_OWN_GROUP = "Start the keeper in a group of its own: systemd-run --user --scope -p Delegate=yes"
_SECOND_VERSION = "Boot with systemd.unified_cgroup_hierarchy=1, or run the keeper as root."
_CONTAINER = "In a container, give it a writable /sys/fs/cgroup: docker run --cgroupns=private --privileged …"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups of ours go for one controller."""

    parent: Path
    version: int
    manager: bool = False
    """Whether the user's service manager makes them."""


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
                if parent is not None and name in words(parent / "cgroup.subtree_control"):
                    found.setdefault(name, Hierarchy(parent, 2))
                elif name in words(mount_point / "cgroup.controllers"):
                    why.setdefault(name, reason or f"{parent} has no {name} controller. {_DELEGATE}")
        else:
            for name in set(CONTROLLERS) & options:
                parent = _inside(mount_point, root, memberships.get(name, "/"))
                if os.access(parent, os.W_OK):
                    found.setdefault(name, Hierarchy(parent, 1))
                else:
                    why.setdefault(name, f"cgroup v1 can be written by root alone. {_SECOND_VERSION}")
    if not as_root and not set(CONTROLLERS) <= set(found):
        parent, controllers = scope.available(os.getuid())
        better = [name for name in CONTROLLERS if name in controllers]
        if parent is not None and len(better) > len(found):
            found = {name: Hierarchy(parent, 2, manager=True) for name in better}
            why = {name: f"systemd has given this user no {name} controller. {_DELEGATE}" for name in why}
    for name in CONTROLLERS:
        why.setdefault(name, f"no {name} control group is mounted. {_CONTAINER}")
    return found, {name: reason for name, reason in why.items() if name not in found}


def _second_version(mount_point: Path, root: str, membership: str, *, as_root: bool) -> tuple[Path | None, str]:
    """The group in which ours can be made, its controllers handed on; or why there is none."""
    own = _inside(mount_point, root, membership)
    if own.name == KEEPER_LEAF:
        own = own.parent
    reason = ""
    for parent in (mount_point, own) if as_root else (own,):
        if not os.access(parent, os.W_OK) or not os.access(parent / "cgroup.subtree_control", os.W_OK):
            reason = reason or (_CONTAINER if as_root else f"{parent} belongs to root. {_DELEGATE}")
        elif _hand_on(parent):
            return parent, ""
        else:
            reason = f"other processes are in {parent}. {_OWN_GROUP}"
    return None, reason


def _hand_on(parent: Path) -> bool:
    """Let groups below `parent` have controllers; False if that cannot be."""
    available = [name for name in CONTROLLERS if name in words(parent / "cgroup.controllers")]
    missing = [name for name in available if name not in words(parent / "cgroup.subtree_control")]
    if not missing:
        return bool(available)
    if members(parent) == [os.getpid()]:
        leaf = parent / KEEPER_LEAF
        with contextlib.suppress(OSError):
            leaf.mkdir(exist_ok=True)
            write(leaf / "cgroup.procs", "0")
    for name in missing:
        with contextlib.suppress(OSError):
            write(parent / "cgroup.subtree_control", f"+{name}")
    return any(name in words(parent / "cgroup.subtree_control") for name in available)


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
