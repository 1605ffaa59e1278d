"""What of the NVIDIA driver's a sandbox with GPUs sees: nodes of devices, and what CDI specifications say.

Each backend says by a `Sight` what its sandboxes see already. What a specification says comes along as far as it is not
there by itself, and has a place in that: it never stands in the way of a start.
"""

import logging
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from warmcell.sandbox.backends import cdi
from warmcell.sandbox.backends.places import RESERVED, in_any
from warmcell.sandbox.models import GpuDevice

log = logging.getLogger(__name__)

CONTROL, MEMORY = "/dev/nvidiactl", "/dev/nvidia-uvm"
"""What no program with CUDA does without, besides the nodes of its devices."""
GPU_NODES = (CONTROL, MEMORY, "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
"""What all devices share."""
_LIBRARIES = "LD_LIBRARY_PATH"
_DRIVER = "libcuda.so.1"
_DRIVER_ENTRIES_MAX = 10_000
_LINKS_MAX = 40


class Sight(Protocol):
    """The file system of one sandbox, while it is being planned."""

    @property
    def host_trees(self) -> Mapping[Path, Path]:
        """Guest path → host path of what is shown of the host."""
        ...

    def places(self) -> Collection[str]:
        """All that something is planned for."""
        ...

    def leads(self, place: str) -> str | None:
        """Where a link of the sandbox's own there leads to."""
        ...

    def is_as_it_is(self, tree: Path) -> bool:
        """Whether a tree of the host's is shown there that the sandbox cannot change."""
        ...

    def show(self, source: Path, target: Path) -> None:
        """Show a file or a tree of the host's, to be read."""
        ...

    def link(self, place: str, target: str) -> None:
        """Make a link."""
        ...


def show(sight: Sight, more: cdi.Edits) -> Mapping[str, str]:
    """Files and links that specifications name; the variables by which processes find them.

    This comes after all that the spec asks for.
    """
    added = [place for one in more.files if (place := _add(sight, Path(one.host), one.guest))]
    added += [made for place, target in (more.links or {}).items() if (made := _add_link(sight, place, target))]
    libraries = [place for place in added if ".so" in place or _is_tree(sight, place)]
    env = dict(more.env or {})
    said = filter(None, env.get(_LIBRARIES, "").split(":"))
    new = (os.path.dirname(path) if ".so" in path else path for path in libraries)
    folders = dict.fromkeys((*said, *new, *_told_to_us(sight)))
    return {**env, **({_LIBRARIES: ":".join(folders)} if folders else {})}


def leased(gpus: Sequence[GpuDevice]) -> Sequence[str]:
    """Their own nodes; none of made-up ones."""
    return [node for gpu in gpus if not gpu.simulated for node in gpu.device_nodes]


def nodes(gpus: Sequence[GpuDevice], more: cdi.Edits, *, taken: Sequence[str] = ()) -> Mapping[str, str]:
    """Place in a sandbox → node of the host, of all that these devices need; none for made-up ones. Blocks.

    Args:
        gpus: Which.
        more: What specifications say of them.
        taken: Places below /dev where the sandbox has something of its own.
    """
    own = leased(gpus)
    if not own:
        return {}
    found = {node: node for node in (*own, *GPU_NODES)}
    for one in more.nodes:
        if one.guest in found or (one.guest.startswith("/dev/") and not _meets(one.guest, (*taken, *found))):
            found[one.guest] = one.host
        else:
            _leave_out(one.host, one.guest)
    return {guest: node for guest, node in found.items() if Path(node).is_char_device()}


def _told_to_us(sight: Sight) -> Iterator[str]:
    """Where the driver's library is on machines whose loader does not know, only this process's environment does."""
    for folder in map(Path, filter(None, os.environ.get(_LIBRARIES, "").split(":"))):
        if folder.is_absolute() and (folder / _DRIVER).exists():
            place = _add(sight, folder, str(folder)) or _behind_links(sight, str(folder))
            tree = None if place is None else _tree_around(sight, place)
            if place is not None and tree is not None:
                there = sight.host_trees[tree] / Path(place).relative_to(tree)
                if _is_same(there, folder, sight.host_trees[tree]):
                    yield place


def _add(sight: Sight, source: Path, guest: str) -> str | None:
    """Show what a driver has on the host: where, if it was not there, and is now."""
    try:
        if not (source.is_file() or _has_libraries(source)):
            return None
        place = _behind_links(sight, guest)
        tree = None if place is None else _tree_around(sight, place)
        if place is None or tree is None:
            if place is not None and _is_free(sight, place):
                sight.show(source, Path(place))
                return place
        else:
            there = sight.host_trees[tree] / Path(place).relative_to(tree)
            if there == source or _is_same(there, source, sight.host_trees[tree]):
                return None
            if _can_cover(sight, tree, place, there, source):
                sight.show(source, Path(place))
                return place
    except OSError as error:
        log.warning("%s, which the GPU's driver wants at %s, cannot be looked at: %s", source, guest, error)
        return None
    _leave_out(str(source), guest)
    return None


def _add_link(sight: Sight, guest: str, target: str) -> str | None:
    """Make a link that a driver wants: where, if there is none, and will be one."""
    around = _behind_links(sight, os.path.dirname(guest))
    if around is not None:
        place = os.path.join(around, os.path.basename(guest))
        tree = _tree_around(sight, place)
        if tree is None and _is_free(sight, place):
            sight.link(place, target)
            return place
        if tree is not None and os.path.lexists(sight.host_trees[tree] / Path(place).relative_to(tree)):
            return None
    _leave_out(target, guest)
    return None


def _behind_links(sight: Sight, place: str) -> str | None:
    """Where the sandbox's own links lead it, for none is followed when the root is put together; None: in a circle."""
    for _ in range(_LINKS_MAX):
        ways = [str(way) for way in (*reversed(Path(place).parents), Path(place))]
        way, leads = next(((way, to) for way in ways if (to := sight.leads(way)) is not None), ("", ""))
        if not way:
            return place
        target = os.path.join(os.path.dirname(way), leads)
        place = os.path.normpath(os.path.join(target, os.path.relpath(place, way)))
    return None


def _tree_around(sight: Sight, place: str) -> Path | None:
    """The innermost tree of the host's that it is or lies in."""
    return next((way for way in (Path(place), *Path(place).parents) if way in sight.host_trees), None)


def _is_tree(sight: Sight, place: str) -> bool:
    """Whether a directory of the host's is shown there."""
    source = sight.host_trees.get(Path(place))
    return source is not None and source.is_dir()


def _is_free(sight: Sight, place: str) -> bool:
    """Whether nothing is there, above it or below it: directories can be made then, and nothing is covered."""
    return place != "/" and not _meets(place, (*RESERVED, *sight.places()))


def _can_cover(sight: Sight, tree: Path, place: str, there: Path, source: Path) -> bool:
    """Whether it can be put over what is there in a tree of the system's, where nothing can be made.

    Not in what the sandbox writes, or somebody else: what is there now may be another thing when it starts.
    """
    return (
        sight.is_as_it_is(tree)
        and not in_any(place, RESERVED)
        and not any(in_any(other, [place]) for other in sight.places())
        and there.exists()
        and there.resolve() == sight.host_trees[tree].resolve() / there.relative_to(sight.host_trees[tree])
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
