"""What a sandbox sees: the plan of its file system, for the stage and for bubblewrap's command line.

The stage makes, below one directory that only the sandbox's processes can see (`BASE`), file systems with their caps,
trees with mapped owners, the writable layer; and below that (`ROOT`) the root, put together of these and of the host's
system directories. bubblewrap shows that as one tree, and adds /proc, which must be of the sandbox's own processes.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import etc
from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.backends.layers import SHARED, Part, Saved
from warmcell.sandbox.backends.places import IMAGES, RESERVED, below, in_any, links_on, mount_of
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.guest_files import BEGIN
from warmcell.sandbox.models import Mount, Network

BASE = "m"
"""Name of the stage's directory below the sandbox's own."""
ROOT = "root"
"""Name of the root below that."""
PAGE_BYTES = 4096

_TOP_LEVEL = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_SYS = ("/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/kernel/mm/transparent_hugepage")
NODES = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty"))
"""Devices that every sandbox has."""
NODE_LINKS = {
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "fd": "/proc/self/fd",
    "core": "/proc/kcore",
    "ptmx": "pts/ptmx",
}
_PROC_MASKED = ("/proc/keys", "/proc/key-users", "/proc/timer_list", "/proc/sched_debug")


@dataclass(slots=True)
class View:
    """The file system of one sandbox while it is being planned."""

    base: Path
    identity: Identity
    as_root: bool
    entries: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Guest path → what is there, as the stage is told it: one of the functions below, or a choice between two."""
    masked: tuple[str, ...] | None = ()
    """What of the sandbox's own /proc shows nothing; None where it has none of its own."""
    host_trees: dict[Path, Path] = field(default_factory=dict)
    """Guest path → host path of what is shown of the host, for checks."""
    asked: set[Path] = field(default_factory=set)
    """Those guest paths of it that the spec asks for."""
    file_systems: list[Mapping[str, Any]] = field(default_factory=list)
    directories: list[Mapping[str, Any]] = field(default_factory=list)
    clones: list[Mapping[str, Any]] = field(default_factory=list)
    fills: list[Mapping[str, Any]] = field(default_factory=list)
    """What is copied from a saved layer."""
    overlays: list[Mapping[str, Any]] = field(default_factory=list)
    pipes: list[Mapping[str, Any]] = field(default_factory=list)
    """Where the guest waits for the host: FIFOs of its own."""
    links: dict[str, str] = field(default_factory=dict)
    """Of our own making."""
    aliases: list[Path] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    """By which processes find what is shown."""
    nodes: Mapping[str, str] = field(default_factory=dict)
    """Of leased devices: place in the sandbox → node of the host."""
    saved: Saved | None = None
    """The layer that it begins with."""
    parts: dict[str, Part] = field(default_factory=dict)
    """What `save_layer` saves of it."""

    def tmpfs(
        self,
        name: str,
        *,
        size_bytes: int,
        mode: str,
        owned: bool,
        follow: bool = True,
        devices: Sequence[int] = (),
    ) -> Mapping[str, Any]:
        """A file system in memory of at most `size_bytes`, which can be shown.

        Args:
            name: On the stage.
            size_bytes: Its cap.
            mode: Of its top directory.
            owned: Whether that is the guest's.
            follow: Whether symbolic links on it work. Where the host opens what a guest made, they must not.
            devices: Numbers that its device must not have.
        """
        owner = f",uid={self.identity.uid},gid={self.identity.gid}" if owned and self.as_root else ""
        options = f"mode={mode},size={size_bytes},nr_inodes={most_entries(size_bytes)}{owner}"
        self.file_systems.append({"path": name, "options": options, "follow": follow, "devices": list(devices)})
        return own(name, mode="rw")

    def wait_in(self, name: str) -> None:
        """Have init come only when somebody writes to the FIFO `begin` in this run directory."""
        owner = (self.identity.uid, self.identity.gid) if self.as_root else None
        self.pipes.append({"path": f"{name}/{BEGIN}", "owner": owner})

    def private(self, name: str, *, size_bytes: int, mode: str, owned: bool) -> Mapping[str, Any]:
        """A file system in memory whose files are saved, and here again where a saved layer has them."""
        most = most_entries(size_bytes)
        self.parts[name] = Part(place=name, most_bytes=size_bytes, most_entries=most)
        source = self.saved.part(name) if self.saved is not None else None
        if source is not None:
            self.fill(source, name, most_bytes=size_bytes, most_entries=most)
        devices = self.saved.devices if name == SHARED and self.saved is not None else ()
        return self.tmpfs(name, size_bytes=size_bytes, mode=mode, owned=owned, devices=devices)

    def fill(self, source: Path, path: str, *, most_bytes: int, most_entries: int, only_top: bool = False) -> None:
        """Copy a tree of the saved layer to `path` on the stage's side, or only what its top directory itself is."""
        caps = {"most_bytes": most_bytes, "most_entries": most_entries}
        self.fills.append({"source": str(source), "path": path, "only_top": only_top, **caps})

    def show(self, source: Path, target: Path | None = None, *, mode: str = "ro") -> None:
        """Show a tree of the host, as it is."""
        target = target or source
        self.entries[str(target)] = host(source, mode=mode)
        self.host_trees[target] = source

    def link(self, place: str, target: str) -> None:
        """Have a symbolic link there."""
        self.entries[place] = link(target)

    def places(self) -> Collection[str]:
        """All that something is planned for."""
        return self.entries

    def leads(self, place: str) -> str | None:
        """Where a link of the sandbox's own there leads to."""
        entry = self.entries.get(place, {})
        return str(entry["link"]) if "link" in entry else None

    def is_as_it_is(self, tree: Path) -> bool:
        """Whether a tree of the host's is shown there that the sandbox cannot change."""
        entry = self.entries.get(str(tree), {})
        return entry.get("host") is not None and entry.get("mode") == "ro"

    def clone(
        self,
        name: str,
        source: Path,
        target: Path,
        *,
        mode: str,
        owner: tuple[int, int] | None,
        recursive: bool,
    ) -> None:
        """Show a tree of the host, its owner's files as the guest's own.

        Where the file system refuses that the tree is read-only, and the stage's report says why.
        """
        swap = self._swap(owner)
        self.clones.append({"name": name, "path": name, "source": str(source), "swap": swap, "recursive": recursive})
        self.entries[str(target)] = choice(name, own(name, mode="rw" if mode == "rw" else "ro"), own(name))
        self.host_trees[target] = source

    def swapped(self, path: Path) -> tuple[int, int, int, int] | None:
        """Which ids the stage exchanges to show the files of a tree's owner as the guest's; None where none."""
        return self._swap(self.foreign_owner(path))

    def _swap(self, owner: tuple[int, int] | None) -> tuple[int, int, int, int] | None:
        return None if owner is None else (owner[0], self.identity.uid, owner[1], self.identity.gid)

    def foreign_owner(self, path: Path) -> tuple[int, int] | None:
        """The owner of a tree whose files have to be shown as the guest's; None where nothing has to be done."""
        if not self.as_root:
            return None
        found = path.stat()
        return None if found.st_uid == self.identity.uid else (found.st_uid, found.st_gid)

    def plan(self) -> Mapping[str, Any]:
        """The root, as the stage puts it together, parents before what lies in them.

        Raises:
            InvalidRequestError: Something lies behind a link of the sandbox's own.
        """
        self.make_links()
        rooms = {str(made["path"]) for made in self.file_systems}
        return {
            "path": ROOT,
            "entries": [
                {"place": place.removeprefix("/"), "make": self._is_ours(place, rooms), **self.entries[place]}
                for place in sorted(self.entries, key=_depth)
            ],
        }

    def words(self) -> list[str]:
        """What bubblewrap is told to show."""
        words = ["--dev-bind", str(self.base / ROOT), "/"]
        if self.masked is not None:
            words += ["--proc", "/proc"]
            words += [word for masked in self.masked for word in ("--ro-bind", "/dev/null", masked)]
        return words

    def make_links(self) -> None:
        """Plan the links that the sandbox is to have besides those of the system."""
        whole = (*map(str, self.host_trees), *RESERVED)
        for place, leads in self.links.items():
            self.entries[place] = link(leads)
        for alias in self.aliases:
            for way, target in links_on(alias):
                if not in_any(str(way), whole):
                    self.entries.setdefault(str(way), link(target))

    def _is_ours(self, place: str, rooms: set[str]) -> bool:
        """Whether what lies around a place is the sandbox's own, so that directories may be made there."""
        around = place
        while around != "/":
            around = os.path.dirname(around)
            if around in self.entries:
                entry = self.entries[around]
                if "link" in entry:
                    raise InvalidRequestError(
                        f"{place} cannot be shown: {around} is a link in a sandbox, to {entry['link']}",
                        hint="Choose a target that has no link on its way.",
                    )
                ours = entry.get("ours", False) or entry.get("own") in rooms
                return ours or "file_system" in entry or "directory" in entry
        return True


def own(name: str, *, mode: str = "ro") -> Mapping[str, Any]:
    """A tree of the stage's, by its name below the base."""
    return {"own": name, "mode": mode}


def host(path: Path, *, mode: str = "ro") -> Mapping[str, Any]:
    """A tree, or with mode "dev" a device, of the host's."""
    return {"host": str(path), "mode": mode}


def home(path: Path) -> Mapping[str, Any]:
    """A directory of the host's that is nobody's but the sandbox's."""
    return {**host(path, mode="rw"), "ours": True}


def link(leads: str) -> Mapping[str, Any]:
    """A symbolic link, unless a saved layer has something there."""
    return {"link": leads}


def directory(mode: int) -> Mapping[str, Any]:
    """An empty one. Those that are on the way to something need not be asked for."""
    return {"directory": mode}


def file_system(kind: str) -> Mapping[str, Any]:
    """One that is made for that place: "devpts", or "tmpfs", which is closed when all of the root is there."""
    return {"file_system": kind}


def choice(tree: str, ok: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one if `tree` could be made as it was asked for, else the other."""
    return {"tree": tree, "ok": ok, "else": other}


def most_entries(size_bytes: int) -> int:
    """How many files, links and directories a file system of that size may hold."""
    return max(1024, size_bytes // PAGE_BYTES)


def _depth(path: str) -> tuple[int, str]:
    return path.count("/"), path


def system(view: View) -> None:
    """The system's programs and libraries, a minimal /dev and /proc, and a few public facts about the processors."""
    view.show(Path("/usr"))
    for name in _TOP_LEVEL:
        path = Path("/", name)
        if path.is_symlink():
            view.entries[str(path)] = link(os.readlink(path))
        elif path.is_dir():
            view.show(path)
    view.entries["/proc"] = directory(0o555)
    view.masked = tuple(masked for masked in _PROC_MASKED if Path(masked).exists())
    view.entries["/dev"] = file_system("tmpfs")
    view.entries["/dev/pts"] = file_system("devpts")
    view.entries.update({node: host(Path(node), mode="dev") for node in NODES})
    view.entries.update({f"/dev/{name}": link(leads) for name, leads in NODE_LINKS.items()})
    for path in map(Path, _SYS):
        if path.exists():
            view.show(path)
    # The helper mounts memory images on it, which nobody else may enter.
    view.entries[IMAGES] = directory(0o700)
    view.entries["/var/tmp"] = link("/tmp")
    view.entries["/var/run"] = link("/run")


def configuration(
    view: View, network: Network, *, home: str, name: str
) -> tuple[Mapping[str, bytes], Mapping[str, str]]:
    """/etc. Returns the files and links that the stage writes, by their paths below its base."""
    made = etc.compose(view.identity, home=home, name=name, network=network)
    names = {"etc"}
    for name in (*made.files, *made.links):
        names.update(f"etc/{parent}" for parent in Path(name).parents if str(parent) != ".")
    for name in made.shown:
        names.update(f"etc/{parent}" for parent in (Path(name), *Path(name).parents) if str(parent) != ".")
    view.directories += [{"path": name, "mode": 0o755, "owner": None} for name in sorted(names)]
    view.entries["/etc"] = own("etc")
    for name, source in made.shown.items():
        view.entries[f"/etc/{name}"] = host(source)
    files = {f"etc/{name}": content for name, content in made.files.items()}
    return files, {f"etc/{name}": target for name, target in made.links.items()}


def extra_mount(view: View, mount: Mount, number: int) -> None:
    """A path of the host that the spec asks for.

    Raises:
        InvalidRequestError: It does not exist, or would cover or lie in what a sandbox needs.
    """
    real, target, named = mount_of(mount)
    if named is not None:
        view.aliases.append(named)
    owner = view.foreign_owner(real) if mount.mode == "rw" else None
    view.clone(f"mount{number}", real, target, mode=mount.mode, owner=owner, recursive=True)
    view.asked.add(target)


def hide(view: View, paths: Sequence[Path]) -> None:
    """Cover what is the keeper's own where it would show through a workspace or a mount.

    What the sandbox runs on may lie in it, an image's environment: that stays.

    Raises:
        InvalidRequestError: A mount lies in it.
    """
    view.directories.append({"path": "nothing", "mode": 0o755, "owner": None})
    for path in {path.resolve() for path in paths if path.is_dir()}:
        for target, source in list(view.host_trees.items()):
            if target in view.asked and (path == source or below(source, path)):
                raise InvalidRequestError(f"{source} belongs to Warmcell itself", hint="Choose another directory.")
            if below(path, source):
                _cover(view, target / path.relative_to(source))


def _cover(view: View, place: Path) -> None:
    """Show nothing at a place but what is shown in it by itself, for which there is a directory then."""
    inside = sorted(tree for tree in view.host_trees if place in tree.parents)
    name = f"nothing{len(view.directories)}" if inside else "nothing"
    wanted = {place, *(step for tree in inside for step in (tree, *tree.parents) if place in step.parents)}
    if inside:
        view.directories += [
            {"path": str(Path(name, step.relative_to(place))), "mode": 0o755, "owner": None} for step in sorted(wanted)
        ]
    view.entries[str(place)] = own(name)
