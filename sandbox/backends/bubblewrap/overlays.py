"""Overlays: what a sandbox may change of the host's trees for itself alone, above a saved layer where there is one."""

from pathlib import Path

from warmcell.sandbox.backends import layers
from warmcell.sandbox.backends.bubblewrap.rootfs import View, most_entries
from warmcell.sandbox.backends.environment import PythonEnvironment
from warmcell.sandbox.backends.layers import Part

LEAST_BYTES = 256 * 1024
"""Room that a full layer leaves for the marks of what is removed."""


def python(view: View, environment: PythonEnvironment, *, layer_bytes: int, disk: Path | None) -> None:
    """The Python environment, what packages are installed into below a writable layer.

    Where the workspace or a mount is at the very place of a tree, that stays.

    Args:
        view: Where it is planned.
        environment: What is shown.
        layer_bytes: Cap of the layer, which is in memory.
        disk: A directory for the layer instead, without a cap.
    """
    for number, tree in enumerate(environment.trees):
        if tree not in view.host_trees:
            view.clone(f"python{number}", tree, tree, mode="ro", owner=view.foreign_owner(tree), recursive=False)
    view.aliases += environment.names
    layered = environment.layered
    if layered is None or layered in view.host_trees:
        return
    swap = view.swapped(layered)
    view.clones.append({"name": "lower", "path": "lower", "source": str(layered), "swap": swap, "recursive": False})
    owner = (view.identity.uid, view.identity.gid) if view.as_root else None
    _overlay(view, "environment", "layer", lower="lower", size_bytes=layer_bytes, disk=disk, owner=owner, mode=0o755)
    if view.saved is None:
        view.directories += [
            {"path": f"layer/upper/{name}", "mode": 0o755, "owner": owner}
            for name in _skeleton(view, environment, layered)
        ]
    target = str(layered)
    view.entries[target] = [
        {
            "tree": "layer",
            "ok": ["--bind", str(view.base / "environment"), target],
            "else": ["--ro-bind", str(view.base / "lower"), target],
        }
    ]
    view.host_trees[layered] = layered


def read_only(view: View, environment: PythonEnvironment) -> None:
    """The Python environment without a layer."""
    trees = (*environment.trees, *([] if environment.layered is None else [environment.layered]))
    for number, tree in enumerate(trees):
        view.clone(f"python{number}", tree, tree, mode="ro", owner=view.foreign_owner(tree), recursive=False)
    view.aliases += environment.names


def workspace(view: View, folder: Path, *, layer_bytes: int) -> None:
    """A folder that the sandbox may change for itself alone, planned as a tree "workspace" before."""
    found = folder.stat()
    owner = None
    if view.as_root:
        swapped = view.foreign_owner(folder) is not None
        owner = (view.identity.uid, view.identity.gid) if swapped else (found.st_uid, found.st_gid)
    mode = found.st_mode & 0o7777
    _overlay(view, "workspace", "changes", lower="workspace", size_bytes=layer_bytes, disk=None, owner=owner, mode=mode)
    target = str(folder)
    view.entries[target] = [
        {
            "tree": "changes",
            "ok": ["--bind", str(view.base / "changed"), target],
            "else": ["--ro-bind", str(view.base / "workspace"), target],
        }
    ]


def _overlay(
    view: View,
    part: str,
    name: str,
    *,
    lower: str,
    size_bytes: int,
    disk: Path | None,
    owner: tuple[int, int] | None,
    mode: int,
) -> None:
    """Plan the overlay of one part of a layer, its writable tree at `name`."""
    saved = view.saved.part(part) if view.saved is not None else None
    lowers = lower
    left = size_bytes
    if saved is not None and view.saved is not None:
        view.clones.append(
            {"name": f"saved-{part}", "path": f"saved-{part}", "source": str(saved), "swap": None, "recursive": False}
        )
        lowers = f"saved-{part}:{lower}"
        left = max(size_bytes - view.saved.bytes[part], LEAST_BYTES)
    if disk is None:
        view.tmpfs(name, size_bytes=left, mode="0755", owned=False)
        most = size_bytes
    else:
        view.clones.append({"name": "disk", "path": name, "source": str(disk), "swap": None, "recursive": False})
        most = 2**62
    view.directories.append({"path": f"{name}/upper", "mode": mode, "owner": owner})
    view.directories.append({"path": f"{name}/work", "mode": 0o755, "owner": owner})
    if saved is not None:
        view.fill(saved, f"{name}/upper", most_bytes=0, most_entries=0, only_top=True)
    view.parts[part] = Part(
        place=f"{name}/upper",
        most_bytes=most,
        most_entries=2 * most_entries(most),
        lowest=lower,
        base=saved is not None,
    )
    made = {"layer": "environment", "changes": "changed"}[name]
    options = layers.marks_option(as_root=view.as_root)
    view.overlays.append(
        {
            "name": name,
            "path": made,
            "lower": lowers,
            "upper": f"{name}/upper",
            "work": f"{name}/work",
            "options": options,
        }
    )


def _skeleton(view: View, environment: PythonEnvironment, layered: Path) -> list[str]:
    """Directories that pip creates files in, to be made in the layer as the guest's own.

    Where somebody else owns the environment and its owner cannot be mapped, a directory of the layer that
    covers one of the environment still lets new packages be installed beside those that are there.
    """
    if layered.stat().st_uid == view.identity.uid:
        return []
    site = environment.site_packages
    wanted = {"bin", "share", "etc", "include"}
    if site is not None:
        below = site.relative_to(layered)
        wanted.update(str(path) for path in (below, *below.parents) if str(path) != ".")
    return sorted(name for name in wanted if (layered / name).is_dir() and not (layered / name).is_symlink())
