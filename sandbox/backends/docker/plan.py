"""From a spec to a container: everything that is decided before anything is made."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import layers, seccomp
from warmcell.sandbox.backends.docker import changes
from warmcell.sandbox.backends.docker.about import EngineInfo
from warmcell.sandbox.backends.docker.changes import Changes
from warmcell.sandbox.backends.docker.graphics import devices
from warmcell.sandbox.backends.docker.image import Image, ulimits
from warmcell.sandbox.backends.docker.shown import Files, bind
from warmcell.sandbox.backends.etc import hostname, own
from warmcell.sandbox.backends.identity import Identity, choose
from warmcell.sandbox.backends.layers import Parts, Saved
from warmcell.sandbox.backends.places import (
    GUEST,
    RUN,
    check_places,
    home_path,
    mount_of,
    persistent_home,
    run_bytes,
    variables,
    workspace_of,
)
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.guest_tree import guest_tree
from warmcell.sandbox.models import GpuDevice, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths

ETC = "etc"
"""Directory, below the sandbox's own, of what is written for it."""
COVER_BYTES = 4096
LOG_BYTES = "128k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the driver makes, and what it tells about it."""

    config: Mapping[str, Any]
    """The container, as the engine's API takes it."""
    files: Mapping[str, tuple[bytes, int]]
    """Below the sandbox's directory: content and mode."""
    identity: Identity
    home: str
    image: Image
    parts: Parts
    saved: Saved | None
    contents: Mapping[str, str]
    """Parts that begin with what the image has there, and where it has it. A saved layer has it already."""
    changes: Changes | None
    """What it may change of its workspace for itself alone."""
    note: str
    """Why the workspace is not as asked for."""
    user_site: str
    """Directory in the sandbox that pip installs into; empty where that is there already, or of no use."""


def prepare(
    spec: SandboxSpec,
    *,
    sandbox_id: SandboxId,
    directory: Path,
    gpus: Sequence[GpuDevice],
    paths: Paths,
    info: EngineInfo,
    image: Image,
    runtime: str,
    labels: Mapping[str, str],
    layer: Path | None = None,
    named: SandboxId | None = None,
) -> Prepared:
    """Decide everything about a sandbox, and make its persistent home. Blocks.

    Raises:
        InvalidRequestError: The spec asks for what cannot be.
        SnapshotError: The layer is of another spec, does not fit its limits, or is not whole.
    """
    limits = spec.limits
    workspace = workspace_of(spec)
    identity = choose(workspace, spec.user)
    home = home_path(spec, workspace, identity)
    files = Files(identity=identity, info=info)
    files.own("/tmp", size_bytes=limits.layer_bytes, mode="1777", options="exec", part="tmp")
    files.own("/dev/shm", size_bytes=limits.shm_bytes, mode="1777", options="exec", part="shm")
    files.own(RUN, size_bytes=run_bytes(limits), mode="0700", options="noexec")
    if spec.home == "private":
        files.own(home, size_bytes=limits.layer_bytes, mode="0700", options="exec", part="home")
    else:
        files.trees[Path(home)] = persistent_home(paths, identity, as_root=os.getuid() == 0)
        files.writable.add(Path(home))
    _shown(files, spec, workspace)
    contents = _volumes(files, image, size_bytes=limits.layer_bytes)
    _hide(files, [paths.runtime, paths.state], allowed=home)
    copied = files.copied(spec, workspace)
    fits = {
        "uid": str(identity.uid),
        "gid": str(identity.gid),
        "environment": f"{image.id} {image.python}",
        "home": home,
        "workspace": str(workspace) if copied else "",
        "marks": layers.marks(as_root=os.getuid() == 0),
    }
    saved = None if layer is None else layers.look_at(layer, fits=fits)
    made = None
    if copied and workspace is not None:
        made = changes.planned(workspace, copied, saved=saved, layer_bytes=limits.layer_bytes)
        files.change(made, workspace, layer_bytes=limits.layer_bytes)
    if saved is not None:
        saved.check(files.parts)

    site = f"{home}/.local/lib/python{image.version[0]}.{image.version[1]}/site-packages"
    written = _written(identity, spec, home=home, name=hostname(named or sandbox_id))
    mounts = [
        *files.mounts(),
        bind(guest_tree(paths), GUEST),
        *(bind(directory / ETC / name, f"/etc/{target}") for name, (target, _, _) in written.items()),
    ]
    return Prepared(
        config=_container(
            spec,
            image=image,
            identity=identity,
            env=_environment(identity, image, home=home, gpus=gpus, info=info),
            name=hostname(named or sandbox_id),
            labels=labels,
            podman=info.podman,
            host={
                "Tmpfs": files.memory,
                "Mounts": mounts,
                **({"Runtime": runtime} if runtime else {}),
                **({"UsernsMode": "keep-id"} if info.keeps_user else {}),
                **devices(gpus, info),
            },
        ),
        files={f"{ETC}/{name}": (content, mode) for name, (_, content, mode) in written.items()},
        identity=identity,
        home=home,
        image=image,
        parts=Parts(
            parts=files.parts,
            marks=fits["marks"],
            fits=fits,
            # Where an overlay is mounted each has its own.
            shown=tuple(str(place).lstrip("/") for place in files.trees if str(place) not in copied),
        ),
        saved=saved,
        contents={part: path for part, path in contents.items() if saved is None and path in image.filled},
        changes=made,
        note=" ".join(files.notes),
        user_site=site if spec.home == "private" and saved is None and image.user_site else "",
    )


def _shown(files: Files, spec: SandboxSpec, workspace: Path | None) -> None:
    """The workspace and further mounts."""
    own_places = set(files.trees)
    if workspace is not None and spec.workspace is not None:
        files.show(workspace, workspace, mode=spec.workspace.mode)
    aliases = [] if workspace is None or spec.workspace is None else [(Path(spec.workspace.path), workspace)]
    for mount in spec.mounts:
        real, target, named = mount_of(mount)
        files.show(real, target, mode=mount.mode)
        if named is not None:
            aliases.append((named, target))
    check_places({target: source for target, source in files.trees.items() if target not in own_places})
    for path, real in aliases:
        files.named(path, real)


def _volumes(files: Files, image: Image, *, size_bytes: int) -> Mapping[str, str]:
    """What an image declares to be volumes: files of the sandbox's own, in memory, unless it has something there.
    Their paths by the names of the parts.

    The engine makes one of its own for each of these paths at which nothing is asked for, as the image spells them.
    """
    run, made = RUN, {}
    # Those at which no link leads elsewhere come first: others may lead there.
    for number, (declared, real) in sorted(enumerate(image.volumes.items()), key=lambda one: one[1][0] != one[1][1]):
        if declared in files.memory or Path(declared) in files.trees:
            continue
        if Path(real) in Path(RUN).parents:
            # Who can write there could put another in its place. What lies deeper is mounted later.
            files.own(declared, size_bytes=size_bytes, mode="0755", options="exec", of_root=True)
            run = max(run, f"{declared}{RUN.removeprefix(real)}", key=lambda path: path.count("/"))
        elif real in files.memory:
            files.memory[declared] = files.memory[real]
        elif Path(real) in files.trees:
            files.named(Path(declared), Path(real))
        else:
            part = f"volume{number}"
            files.own(declared, at=real, size_bytes=size_bytes, mode="0755", options="exec", part=part)
            made[part] = declared
    files.memory[run] = files.memory.pop(RUN)
    return made


def _hide(files: Files, own_directories: Sequence[Path], *, allowed: str) -> None:
    """Cover what is the keeper's own where it would show through a workspace or a mount.

    Raises:
        InvalidRequestError: A mount lies in it.
    """
    for path in {path.resolve() for path in own_directories if path.is_dir()}:
        for target, source in files.trees.items():
            if str(target) == allowed:
                continue
            if path == source or path in source.parents:
                raise InvalidRequestError(f"{source} belongs to Warmcell itself", hint="Choose another directory.")
            if source in path.parents:
                cover = str(target / path.relative_to(source))
                files.memory[cover] = f"ro,nosuid,nodev,noexec,size={COVER_BYTES},mode=0555"


def _written(identity: Identity, spec: SandboxSpec, *, home: str, name: str) -> Mapping[str, tuple[str, bytes, int]]:
    """What is written for it below /etc: name of ours to name there, content and mode."""
    text = own(identity, home=home, name=name, network=spec.network)
    made = {
        "passwd": ("passwd", text["passwd"], 0o644),
        "group": ("group", text["group"], 0o644),
        "pip.conf": ("xdg/pip/pip.conf", text["pip.conf"], 0o644),
    }
    if spec.network == "none":
        made["resolv.conf"] = ("resolv.conf", b"", 0)  # The engine would copy the host's.
    return made


def _environment(
    identity: Identity, image: Image, *, home: str, gpus: Sequence[GpuDevice], info: EngineInfo
) -> Mapping[str, str]:
    python = Path(image.python)
    made = dict(variables(identity, home=home, python=python))
    if "PATH" in image.env:
        made["PATH"] = f"{python.parent}:{image.env['PATH']}"
    real = any(not gpu.simulated for gpu in gpus)
    if not real and ("nvidia" in info.runtimes or "NVIDIA_VISIBLE_DEVICES" in image.env):
        made["NVIDIA_VISIBLE_DEVICES"] = "void"  # Images of CUDA's ask for all devices there are.
    return made


def _container(
    spec: SandboxSpec,
    *,
    image: Image,
    identity: Identity,
    env: Mapping[str, str],
    name: str,
    labels: Mapping[str, str],
    host: Mapping[str, Any],
    podman: bool,
) -> Mapping[str, Any]:
    limits = spec.limits
    steps = seccomp.denylist(platform.machine(), setgid=os.getuid() == 0).hex()
    memory = {} if limits.memory_bytes is None else {"Memory": limits.memory_bytes, "MemorySwap": limits.memory_bytes}
    return {
        "Image": image.id,
        "Entrypoint": [image.python, "-I", "-S", f"{GUEST}/confined.py"],
        "Cmd": [
            *(steps, "--run", RUN, "--guest", GUEST, "--python", image.python),
            *("--umask", f"{spec.files_umask:o}"),
        ],
        "User": f"{identity.uid}:{identity.gid}",
        "Env": [f"{variable}={value}" for variable, value in env.items()],
        "Labels": dict(labels),
        "WorkingDir": "/",
        "Healthcheck": {"Test": ["NONE"]},
        **({"Hostname": name} if spec.network == "none" else {}),
        "HostConfig": {
            "NetworkMode": spec.network,
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "RestartPolicy": {"Name": "no"},
            "Init": False,
            "Ulimits": ulimits(podman=podman),
            "LogConfig": {"Type": "json-file", "Config": {"max-size": LOG_BYTES, "max-file": "1"}},
            **memory,
            **({} if limits.pids is None else {"PidsLimit": limits.pids}),
            **({} if limits.cpus is None else {"NanoCpus": int(limits.cpus * 1e9)}),
            **host,
        },
    }
