"""What a sandbox with GPUs sees of the machine: device nodes, and what its CDI specifications say."""

import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends import cdi
from warmcell.sandbox.backends.bubblewrap.rootfs import NODE_LINKS, NODES, View, host, in_any, link
from warmcell.sandbox.backends.places import RESERVED
from warmcell.sandbox.models import GpuDevice

log = logging.getLogger(__name__)

GPU_NODES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
"""What all devices share."""
_SYS = ("/sys/bus/pci", "/sys/devices/pci*", "/sys/module/nvidia*", "/sys/class/drm")
_OWN_NODES = (*NODES, *(f"/dev/{name}" for name in (*NODE_LINKS, "pts", "shm")))
_LIBRARIES = "LD_LIBRARY_PATH"
_DRIVER = "libcuda.so.1"
_DRIVER_ENTRIES_MAX = 10_000
_LINKS_MAX = 40


def show(view: View, gpus: Sequence[GpuDevice]) -> None:
    """The nodes of the leased devices, those that all devices share, and where libraries look devices up.

    What the machine's CDI specifications say comes along, as far as it is not there by itself, and has a place in what
    is planned already: it never stands in the way of a start. So this comes after all that the spec asks for.
    """
    more = cdi.edits(gpus)
    view.nodes = nodes(gpus, more)
    if not view.nodes:
        return
    for guest, node in view.nodes.items():
        view.entries[guest] = host(Path(node), mode="dev")
    for pattern in _SYS:
        for path in sorted(Path("/").glob(pattern.lstrip("/"))):
            view.show(path)
    view.make_links()
    added = [place for one in more.files if (place := _add(view, Path(one.host), one.guest))]
    added += [made for place, target in (more.links or {}).items() if (made := _add_link(view, place, target))]
    libraries = [place for place in added if ".so" in place or _is_tree(view, place)]
    env = dict(more.env or {})
    said = filter(None, env.get(_LIBRARIES, "").split(":"))
    new = (os.path.dirname(path) if ".so" in path else path for path in libraries)
    folders = dict.fromkeys((*said, *new, *_told_to_us(view)))
    view.env |= {**env, **({_LIBRARIES: ":".join(folders)} if folders else {})}


def nodes(gpus: Sequence[GpuDevice], more: cdi.Edits | None = None) -> Mapping[str, str]:
    """Place in a sandbox → node of the host, of all that these devices need; none for made-up ones. Blocks."""
    leased = [node for gpu in gpus if not gpu.simulated for node in gpu.device_nodes]
    if not leased:
        return {}
    more = more or cdi.edits(gpus)
    found = {node: node for node in (*leased, *GPU_NODES)}
    for one in more.nodes:
        if one.guest in found or (one.guest.startswith("/dev/") and not _meets(one.guest, (*_OWN_NODES, *found))):
            found[one.guest] = one.host
        else:
            _leave_out(one.host, one.guest)
    return {guest: node for guest, node in found.items() if Path(node).is_char_device()}


def _told_to_us(view: View) -> Iterator[str]:
    """Where the driver's library is on machines whose loader does not know, only this process's environment does."""
    for folder in map(Path, filter(None, os.environ.get(_LIBRARIES, "").split(":"))):
        if folder.is_absolute() and (folder / _DRIVER).exists():
            place = _add(view, folder, str(folder)) or _behind_links(view, str(folder))
            tree = None if place is None else _tree_around(view, place)
            if place is not None and tree is not None:
                there = view.host_trees[tree] / Path(place).relative_to(tree)
                if _is_same(there, folder, view.host_trees[tree]):
                    yield place


def _add(view: View, source: Path, guest: str) -> str | None:
    """Show what a driver has on the host: where, if it was not there, and is now."""
    try:
        if not (source.is_file() or _has_libraries(source)):
            return None
        place = _behind_links(view, guest)
        tree = None if place is None else _tree_around(view, place)
        if place is None or tree is None:
            if place is not None and _is_free(view, place):
                view.show(source, Path(place))
                return place
        else:
            there = view.host_trees[tree] / Path(place).relative_to(tree)
            if there == source or _is_same(there, source, view.host_trees[tree]):
                return None
            if _can_cover(view, tree, place, there, source):
                view.show(source, Path(place))
                return place
    except OSError as error:
        log.warning("%s, which the GPU's driver wants at %s, cannot be looked at: %s", source, guest, error)
        return None
    _leave_out(str(source), guest)
    return None


def _add_link(view: View, guest: str, target: str) -> str | None:
    """Make a link that a driver wants: where, if there is none, and will be one."""
    around = _behind_links(view, os.path.dirname(guest))
    if around is not None:
        place = os.path.join(around, os.path.basename(guest))
        tree = _tree_around(view, place)
        if tree is None and _is_free(view, place):
            view.entries[place] = link(target)
            return place
        if tree is not None and os.path.lexists(view.host_trees[tree] / Path(place).relative_to(tree)):
            return None
    _leave_out(target, guest)
    return None


def _behind_links(view: View, place: str) -> str | None:
    """Where the sandbox's own links lead it, for none is followed when the root is put together; None: in a circle."""
    for _ in range(_LINKS_MAX):
        ways = [str(way) for way in (*reversed(Path(place).parents), Path(place))]
        way = next((way for way in ways if "link" in view.entries.get(way, {})), None)
        if way is None:
            return place
        target = os.path.join(os.path.dirname(way), str(view.entries[way]["link"]))
        place = os.path.normpath(os.path.join(target, os.path.relpath(place, way)))
    return None


def _tree_around(view: View, place: str) -> Path | None:
    """The innermost tree of the host's that it is or lies in."""
    return next((way for way in (Path(place), *Path(place).parents) if way in view.host_trees), None)


def _is_tree(view: View, place: str) -> bool:
    """Whether a directory of the host's is shown there."""
    source = view.host_trees.get(Path(place))
    return source is not None and source.is_dir()


def _is_free(view: View, place: str) -> bool:
    """Whether nothing is there, above it or below it: directories can be made then, and nothing is covered."""
    return place != "/" and not _meets(place, (*RESERVED, *view.entries))


def _can_cover(view: View, tree: Path, place: str, there: Path, source: Path) -> bool:
    """Whether it can be put over what is there in a tree of the system's, where nothing can be made.

    Not in what the sandbox writes, or somebody else: what is there now may be another thing when it starts.
    """
    entry = view.entries.get(str(tree), {})
    return (
        entry.get("host") is not None
        and entry.get("mode") == "ro"
        and not in_any(place, RESERVED)
        and not any(in_any(other, [place]) for other in view.entries)
        and there.exists()
        and there.resolve() == view.host_trees[tree].resolve() / there.relative_to(view.host_trees[tree])
        and there.is_dir() == source.is_dir()
    )


def _is_same(one: Path, other: Path, tree: Path) -> bool:
    """Whether a path in a tree leads to the other file, on a way that stays in the tree."""
    real = one.resolve()
    return real == other.resolve() and real.is_relative_to(tree.resolve())


def _meets(place: str, others: Sequence[str]) -> bool:
    """Whether it lies in one of the others, or one of them in it."""
    return in_any(place, others) or any(in_any(other, [place]) for other in others)


def _leave_out(source: str, guest: str) -> None:
    log.warning("the GPU's driver wants %s at %s, where it cannot be shown", source, guest)


def _has_libraries(place: Path) -> bool:
    """Whether it is a directory of libraries, with nothing in it by which a service of the host could be spoken to."""
    names: list[str] = []
    for folder, folders, files in os.walk(place):
        names += files
        kinds = {stat.S_IFMT(os.lstat(os.path.join(folder, name)).st_mode) for name in (*folders, *files)}
        if len(names) > _DRIVER_ENTRIES_MAX or kinds - {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}:
            return False
    return any(".so" in name for name in names)
