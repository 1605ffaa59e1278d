"""From a spec to what is started: the sandbox's root, and the OCI configuration beside it.

The root is composed by the stage of the host's trees, and gVisor keeps what the sandbox changes of it in the sandbox's
own memory, so an image of the sandbox has it. What must reach the host, or has a cap of its own, is a mount beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import etc, seccomp
from warmcell.sandbox.backends.environment import PythonEnvironment, discover
from warmcell.sandbox.backends.gvisor import nvproxy
from warmcell.sandbox.backends.gvisor.root import BASE, CHANGES, ROOT, Root
from warmcell.sandbox.backends.identity import choose
from warmcell.sandbox.backends.places import (
    GUEST,
    RUN,
    USUAL_HOME,
    home_path,
    leads_home,
    mount_of,
    persistent_home,
    run_bytes,
    variables,
    workspace_of,
)
from warmcell.sandbox.errors import UnsupportedOperationError
from warmcell.sandbox.guest.supervisor.relays import OWN
from warmcell.sandbox.guest_tree import guest_tree
from warmcell.sandbox.models import MIB, GpuDevice, Limits, Mount, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths

SOCKETS_BYTES = 1 * MIB
AS_ASKED, READ_ONLY = "b", "o"
"""Names of two configurations: the second is for a workspace whose owner cannot be shown as the guest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the driver starts, and what it tells about it."""

    mounts: Mapping[str, Any]
    configurations: Mapping[str, Mapping[str, Any]]
    """By name of the directory that each is written to."""
    workspace: str | None
    """The stage's name of a workspace that the guest is to write."""


def prepare(
    spec: SandboxSpec,
    *,
    sandbox_id: SandboxId,
    directory: Path,
    gpus: Sequence[GpuDevice],
    paths: Paths,
    hidden: Sequence[Path],
    named: SandboxId | None = None,
    beside: bool = False,
) -> Prepared:
    """Decide everything about a sandbox, and make its persistent home. Blocks.

    Args:
        spec: What somebody wants.
        sandbox_id: Its name.
        directory: For it alone.
        gpus: Its devices.
        paths: The keeper's directories.
        hidden: What no sandbox sees.
        named: Whose name it has as a host.
        beside: A copy-on-write folder is a mount, as the folder was of the one that was saved.

    Raises:
        InvalidRequestError: The spec asks for what cannot be.
        UnsupportedOperationError: It asks for what this backend has not.
        BackendUnavailableError: No filter is known for this machine, or the driver of its GPUs lacks a node.
    """
    if spec.network != "none":
        raise UnsupportedOperationError(
            "gVisor sandboxes have no network", hint='Choose network "none", or the bubblewrap backend.'
        )
    environment = discover(spec.python)
    workspace = workspace_of(spec)
    identity = choose(workspace, spec.user)
    home = home_path(spec, workspace, identity)
    name = etc.hostname(named or sandbox_id)
    root = Root(base=directory / BASE, identity=identity)
    _private(root, spec, home, paths, _trees(environment))
    root.tree(Path(GUEST), guest_tree(paths))
    root.system()
    root.configuration(etc.compose(identity, home=home, name=name, network="none"))
    lower: Path | None = None
    if workspace is not None and spec.workspace is not None:
        root.alias(Path(spec.workspace.path))
        root.asked.add(workspace)
        if spec.workspace.mode == "cow" and not beside:
            root.own_tree(workspace)
        elif spec.workspace.mode == "cow":
            lower = root.overlay(workspace, size_bytes=spec.limits.layer_bytes)
            root.bind(str(workspace), root.base / "changed", mode="rw")
            root.host_trees[workspace] = workspace
        else:
            root.bind(str(workspace), root.clone(workspace, foreign=True), mode=spec.workspace.mode)
            root.host_trees[workspace] = workspace
    for mount in spec.mounts:
        _mount(root, mount)
    _environment(root, environment)
    if leads_home(home, root.host_trees):
        root.links[f"{ROOT}{USUAL_HOME}"] = home
    shown = nvproxy.show(root, gpus)
    root.hide([paths.runtime, paths.state, *hidden])

    init = [str(environment.python), "-I", "-S", f"{GUEST}/init.py"]
    env = {**shown.env, **variables(identity, home=home, python=environment.python)}
    process = {
        "args": [
            *(*init, "--run", RUN, "--guest", GUEST, "--python", str(environment.python)),
            *("--umask", f"{spec.files_umask:o}"),
        ],
        "env": [f"{key}={value}" for key, value in env.items()],
        "cwd": "/",
        "user": {"uid": identity.uid, "gid": identity.gid, "umask": 0o22},
        "noNewPrivileges": True,
        "capabilities": {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")},
        "rlimits": _rlimits(spec.limits),
    }
    made = {AS_ASKED: root.oci_mounts()}
    written: str | None = None
    if workspace is not None and spec.workspace is not None and spec.workspace.mode == "rw":
        source, _ = root.binds[str(workspace)]
        written = source.name
        root.bind(str(workspace), source, mode="ro")
        made[READ_ONLY] = root.oci_mounts()
    elif lower is not None:
        written = CHANGES
        root.bind(str(workspace), lower, mode="ro")
        made[READ_ONLY] = root.oci_mounts()
    return Prepared(
        mounts=root.stage_plan(),
        configurations={
            each: _configuration(root, process, name, mounts, shown.devices) for each, mounts in made.items()
        },
        workspace=written,
    )


def write(prepared: Prepared, directory: Path) -> None:
    """Write the configurations below `directory`. Blocks."""
    for name, configuration in prepared.configurations.items():
        (directory / name).mkdir(mode=0o700)
        (directory / name / "config.json").write_text(json.dumps(configuration))


def _configuration(
    root: Root,
    process: Mapping[str, Any],
    name: str,
    mounts: Sequence[Mapping[str, Any]],
    devices: Sequence[Mapping[str, Any]],
) -> Mapping[str, Any]:
    return {
        "ociVersion": "1.0.0",
        "process": process,
        "root": {"path": str(root.base / ROOT), "readonly": False},
        "hostname": name,
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "seccomp": seccomp.rules(),
            **({"devices": devices} if devices else {}),
        },
    }


def _rlimits(limits: Limits) -> list[Mapping[str, Any]]:
    return [] if limits.pids is None else [{"type": "RLIMIT_NPROC", "hard": limits.pids, "soft": limits.pids}]


def _private(root: Root, spec: SandboxSpec, home: str, paths: Paths, trees: Sequence[Path]) -> None:
    """What a sandbox has of its own: in its memory, with a cap, and the run directory on the host.

    Where the interpreter lies in /tmp or the home, those are in the root: files of a mount of its own would be slow,
    and nobody could install packages.
    """
    identity = root.identity
    root.memory("/proc", kind="proc")
    if _in_any("/tmp", trees):
        root.directories[f"{ROOT}/tmp"] = (0o1777, None)
    else:
        root.memory("/tmp", size_bytes=spec.limits.layer_bytes, mode="1777")
    root.memory("/dev", mode="0755")
    root.memory("/dev/shm", size_bytes=spec.limits.shm_bytes, mode="1777")
    if spec.home == "persistent":
        root.bind(home, persistent_home(paths, identity, as_root=True), mode="rw")
    elif _in_any(home, trees):
        root.directories[f"{ROOT}{home}"] = (0o700, (identity.uid, identity.gid))
    else:
        root.memory(home, size_bytes=spec.limits.layer_bytes, mode="0700", owned=True)
    root.file_system("run", size_bytes=run_bytes(spec.limits))
    root.bind(RUN, root.base / "run", mode="rw")
    root.directories[f"run/{OWN}"] = (0o700, (identity.uid, identity.gid))
    root.memory(f"{RUN}/{OWN}", size_bytes=SOCKETS_BYTES, mode="0700", owned=True)


def _mount(root: Root, mount: Mount) -> None:
    """A path of the host that the spec asks for.

    Raises:
        InvalidRequestError: It does not exist, or would cover or lie in what a sandbox needs.
    """
    real, target, alias = mount_of(mount)
    if alias is not None:
        root.alias(alias)
    root.bind(str(target), root.clone(real, foreign=mount.mode == "rw"), mode=mount.mode)
    root.host_trees[target] = real
    root.asked.add(target)


def _environment(root: Root, environment: PythonEnvironment) -> None:
    """The trees of the interpreter; what packages are installed into is the guest's to change, for itself alone.

    Where a tree lies in what is a mount of its own, a workspace say, it is one too, and read-only.
    """
    for tree in _trees(environment):
        if tree in root.host_trees:
            continue
        if root.is_covered(tree):
            root.bind(str(tree), root.clone(tree), mode="ro")
            root.host_trees[tree] = tree
        elif tree == environment.layered:
            root.own_tree(tree)
        else:
            root.tree(tree, tree)
    for name in environment.names:
        root.alias(name)


def _trees(environment: PythonEnvironment) -> list[Path]:
    return [*environment.trees, *([] if environment.layered is None else [environment.layered])]


def _in_any(place: str, trees: Sequence[Path]) -> bool:
    """Whether any of the trees lies there."""
    return any(tree.is_relative_to(place) for tree in trees)
