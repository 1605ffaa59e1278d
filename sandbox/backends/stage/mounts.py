"""The mounts that a plan asks for."""

from __future__ import annotations

import ctypes
import os
import stat

from .alone import is_first, map_ids
from .filling import fill, fill_as
from .linux import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_RECURSIVE,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    MNT_DETACH,
    MOUNT_ATTR_IDMAP,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_NOSYMFOLLOW,
    MS_PRIVATE,
    MS_REC,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
    SYS_MOUNT_SETATTR,
    SYS_OPEN_TREE,
    MountAttr,
    Refused,
    attach,
    call,
    clone,
    libc,
    mount,
    write,
)
from .overlay import make_overlay
from .owners import namespace_that_swaps
from .root import make_root, open_shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


GUEST_UMASK = 0o022
"""Of what a guest makes, in a workspace too: as in a container, and whatever the keeper's own is."""


def make_mounts(plan: Mapping[str, Any], *, for_others: bool = False) -> dict[str, str]:
    """A private mount namespace with the sandbox's own file systems below `plan["base"]`.

    Where they are `for_others`, anybody may go there, whoever the directories above it belong to.

    With a `user` in the plan this is root, who makes it for somebody else: what is read or written of that user's files
    is so with that user's rights.

    Returns why each of the plan's trees is not as asked; empty where it is.
    """
    uid, gid = os.geteuid(), os.getegid()
    user: tuple[int, int] | None = plan.get("user")
    if plan["user_namespace"] and not is_first():
        call("make a user namespace", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        map_ids(uid, gid)
    else:
        call("make a mount namespace", libc.unshare(CLONE_NEWNS))
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # First of all, since a workspace may contain the very directory that the rest is mounted in.
    clones = [(made, *open_clone(made)) for made in plan["clones"]]
    shown = open_shown(plan["root"]) if "root" in plan else {}
    base = plan["base"]
    os.umask(0)
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=16m,nr_inodes=65536")
    os.chdir(base)
    for made in plan["file_systems"]:
        os.mkdir(made["path"], 0o755)
        make_file_system(made)
    for made, tree, _ in clones:
        attach(tree, made["path"])
    for made in plan["directories"]:
        os.mkdir(made["path"], made["mode"])
        if made["owner"] is not None:
            os.chown(made["path"], *made["owner"])
    for made in plan["files"]:
        write(made["path"], made["content"])
        os.chmod(made["path"], 0o644)
    for made in plan["links"]:
        os.symlink(made["target"], made["path"])
    for made in plan.get("pipes", ()):
        os.mkfifo(made["path"], 0o600)
        if made["owner"] is not None:
            os.chown(made["path"], *made["owner"])
    if plan["fills"]:
        if user is None:
            fill(plan["fills"], owners=not plan["user_namespace"])
        else:
            fill_as(user, plan["fills"])
    report = {made["name"]: why for made, _, why in clones}
    report.update({made["name"]: make_overlay(made, user=user) for made in plan["overlays"]})
    for made in plan.get("views", ()):
        attach(clone(made["of"]), made["path"], there=made["there"])
    if "root" in plan:
        make_root(plan["root"], report, shown)
    if is_first():  # bubblewrap looks at its own processes by their numbers; paths in the plan were the host's.
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir("/")
    if for_others:
        clear_way(base)
    os.umask(GUEST_UMASK)
    return report


def make_file_system(plan: Mapping[str, Any]) -> None:
    """One in memory, with another device number than those that the plan knows of."""
    links = 0 if plan["follow"] else MS_NOSYMFOLLOW
    held = []
    while True:
        mount("tmpfs", plan["path"], "tmpfs", MS_NOSUID | MS_NODEV | links, plan["options"])
        if os.stat(plan["path"]).st_dev not in plan.get("devices", ()):
            break
        held.append(clone(plan["path"]))  # As long as it is there nobody else gets that number.
        call(f"unmount {plan['path']}", libc.umount2(os.fsencode(plan["path"]), MNT_DETACH))
    for tree in held:
        os.close(tree)


def clear_way(path: str) -> None:
    """Let anybody come to what is mounted at that directory, in this mount namespace alone.

    What is covered for it lies behind a closed directory, where those others could not go either.
    """
    way = [path]
    while (above := os.path.dirname(way[0])) != "/":
        way.insert(0, above)
    for number, place in enumerate(way[:-1], 1):
        if not os.stat(place).st_mode & stat.S_IXOTH:
            tree = clone(path)
            call(f"unmount {path}", libc.umount2(os.fsencode(path), MNT_DETACH))
            mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64k,nr_inodes=64")
            for below in way[number:]:
                os.mkdir(below, 0o755)
            attach(tree, path, there=True)
            return


def open_handles(plan: Mapping[str, Any]) -> list[int]:
    """Descriptors of the run directory and of the base, in the mount namespace that this process stays in."""
    base = plan["base"]
    return [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (f"{base}/{plan['run']}", base)]


def open_clone(plan: Mapping[str, Any]) -> tuple[int, str]:
    """The tree `source`, its owner's files as those of somebody else, as a descriptor of a mount that is nowhere yet.

    With it comes why its owner is as on the host instead, else nothing. A `tree` in the plan is such a descriptor.
    """
    if "tree" in plan:
        return plan["tree"], ""
    recursive = AT_RECURSIVE if plan["recursive"] else 0
    tree = open_by_name(plan["source"], OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive)
    if plan["swap"] is None:
        return tree, ""
    try:
        attributes = MountAttr(MOUNT_ATTR_IDMAP, 0, 0, namespace_that_swaps(*plan["swap"]))
        size = ctypes.sizeof(attributes)
        call(
            "idmapped mount",
            libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | recursive, ctypes.byref(attributes), size),
        )
    except Refused as error:
        return tree, str(error)
    return tree, ""


def open_by_name(source: str, flags: int) -> int:
    """A clone of the tree at `source`, which may lie behind a descriptor of the keeper's and move meanwhile.

    The mount behind a descriptor belongs to the keeper's namespace, and only those of our own can be cloned.
    """
    while True:
        name = name_of(source)
        tree = libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(name), flags)
        if tree >= 0 or name_of(source) == name:
            return call(f"open {name}", tree)


def name_of(source: str) -> str:
    """Where it lies now."""
    if not source.startswith("/proc/"):
        return source
    behind = os.open(source, os.O_PATH | os.O_CLOEXEC)
    try:
        return os.readlink(f"/proc/self/fd/{behind}")
    finally:
        os.close(behind)
