"""What a template's process sees and is: the environment read-only, files of its own, and nothing of anybody else's.

It is like the sandboxes that its forks enter, so that what is imported in it finds what it would find there. It has no
workspace, no network and no writable layer. What is in `/proc` are facts about the machine and no process, for beside
it live the sandboxes' monitors, which see the host's files.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import seccomp
from warmcell.sandbox.backends.bubblewrap import overlays, rootfs
from warmcell.sandbox.backends.bubblewrap.plan import (
    SECCOMP_FD,
    STATUS_FD,
    UP_FD,
    add_home,
    inside,
    reachable,
    without_privileges,
)
from warmcell.sandbox.backends.bubblewrap.rootfs import View
from warmcell.sandbox.backends.environment import discover
from warmcell.sandbox.backends.identity import choose
from warmcell.sandbox.backends.places import GUEST, RUN, check_places, home_path, variables, workspace_of
from warmcell.sandbox.guest_tree import guest_tree
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths

FILTER_FD = 10
"""Where it finds the system call filter of its forks."""
_PROC = ("cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "uptime", "version")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePlan:
    """What is started."""

    mounts: Mapping[str, Any]
    argv: tuple[str, ...]
    inherit: Mapping[str, Any]
    env: Mapping[str, str]


def plan_template(
    spec: SandboxSpec, *, modules: tuple[str, ...], env: Mapping[str, str], directory: Path, paths: Paths, bwrap: Path
) -> TemplatePlan:
    """Decide everything about a process that imports `modules` with `env` on top of a sandbox's environment. Blocks.

    Raises:
        InvalidRequestError: As for a sandbox of that spec.
        BackendUnavailableError: Likewise.
    """
    environment = discover(spec.python)
    as_root = os.getuid() == 0
    workspace = workspace_of(spec)
    identity = choose(workspace, spec.user)
    home = home_path(spec, workspace, identity)
    view = View(base=directory / rootfs.BASE, identity=identity, as_root=as_root)
    rootfs.system(view)
    view.masked = None
    for name in _PROC:
        if Path("/proc", name).exists():
            view.entries[f"/proc/{name}"] = rootfs.host(Path("/proc", name))
    files, links = rootfs.configuration(view, "none", home=home, name="warmcell-template")
    for name, target, size in (("tmp", "/tmp", spec.limits.layer_bytes), ("shm", "/dev/shm", spec.limits.shm_bytes)):
        view.entries[target] = view.private(name, size_bytes=size, mode="1777", owned=False)
    add_home(view, replace(spec, home="private"), environment, home, paths)
    tree = guest_tree(paths)
    view.clone("guest", tree, Path(GUEST), mode="ro", owner=view.foreign_owner(tree), recursive=False)
    overlays.read_only(view, environment)
    check_places(view.host_trees)
    rootfs.hide(view, [paths.runtime, paths.state])
    if as_root:
        bwrap = reachable(view, bwrap)
    given = {**variables(identity, home=home, python=environment.python), **env}
    # Not of control groups: from within one of its own, older kernels let nobody join a group that lies outside.
    namespaces = ("--unshare-ipc", "--unshare-uts", "--unshare-net", "--cap-drop", "ALL")
    return TemplatePlan(
        mounts={
            "base": str(view.base),
            "user_namespace": False,
            "file_systems": view.file_systems,
            "directories": view.directories,
            "files": [{"path": name, "content": content} for name, content in files.items()],
            "links": [{"path": name, "target": target} for name, target in links.items()],
            "clones": view.clones,
            "fills": (),
            "overlays": (),
            "root": view.plan(),
            "run": "tmp",
        },
        argv=(
            str(bwrap),
            *namespaces,
            *("--cap-add", "CAP_SETPCAP", "--hostname", "warmcell-template", "--die-with-parent", "--new-session"),
            *inside(view, given),
            *without_privileges(identity, as_root=False),
            *(str(environment.python), f"{GUEST}/enter.py", "kernel.template_process"),
            *(str(UP_FD), str(FILTER_FD), RUN, f"{spec.files_umask:o}", *modules),
        ),
        inherit={
            "control": [STATUS_FD, UP_FD],
            "files": {str(SECCOMP_FD): seccomp.template(), str(FILTER_FD): seccomp.denylist(setgid=as_root)},
        },
        env=given,
    )


def why_not(spec: SandboxSpec) -> str:
    """Why kernels of that spec may not share a template's process; empty where they may. Blocks.

    Code that is imported in it could do in each of their sandboxes what it likes, so no sandbox may change that code.
    A network namespace that is the host's cannot be entered from one that is not.

    Raises:
        InvalidRequestError: There is no such environment.
    """
    if spec.network != "none":
        return "its sandboxes share the host's network"
    environment = discover(spec.python)
    trees = [tree.resolve() for tree in (*environment.trees, environment.layered) if tree is not None]
    writable = [Path(mount.source).resolve() for mount in spec.mounts if mount.mode == "rw"]
    if spec.workspace is not None and spec.workspace.mode == "rw":
        writable.append(Path(spec.workspace.path).resolve())
    for folder in writable:
        if any(folder == tree or folder in tree.parents or tree in folder.parents for tree in trees):
            return f"its sandboxes may write to {folder}, where the environment is"
    return ""
