"""What a gVisor sandbox sees of the host, while it is being planned."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.etc import Etc
from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.backends.places import GUEST, check_places, links_on
from warmcell.sandbox.errors import InvalidRequestError

BASE = "m"
"""Name of the stage's directory below the sandbox's own."""
ROOT = "root"
"""Below that: what becomes the sandbox's root."""
PAGE_BYTES = 4096
_TOP_LEVEL = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_NOTHING = "nothing"
CHANGES = "changes"

Owner = tuple[int, int] | None


@dataclass(slots=True, kw_only=True)
class Root:
    """The file system of one sandbox."""

    base: Path
    identity: Identity
    binds: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Guest path → host path and mode, of mounts beside the root that lead to the host."""
    memories: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Guest path → mount in the sandbox's memory."""
    directories: dict[str, tuple[int, Owner]] = field(default_factory=dict)
    """Made by the stage: path below the base → mode and owner."""
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    clones: list[Mapping[str, Any]] = field(default_factory=list)
    file_systems: list[Mapping[str, Any]] = field(default_factory=list)
    overlays: list[Mapping[str, Any]] = field(default_factory=list)
    trees: dict[Path, str] = field(default_factory=dict)
    """Guest path → clone, of what is in the root itself."""
    host_trees: dict[Path, Path] = field(default_factory=dict)
    """Guest path → host path of all that is shown of the host."""
    own: set[Path] = field(default_factory=set)
    """Those guest paths of it that the sandbox changes, for itself alone."""
    asked: set[Path] = field(default_factory=set)
    """Those guest paths of it that the spec asks for."""
    aliases: list[Path] = field(default_factory=list)

    def clone(self, source: Path, *, foreign: bool = False) -> Path:
        """A tree of the host; where the stage has it. If `foreign`, its owner's files are the guest's own."""
        name = f"t{len(self.clones)}"
        swap = self._swap(source) if foreign else None
        self.clones.append({"name": name, "path": name, "source": str(source), "swap": swap, "recursive": True})
        return self.base / name

    def tree(self, target: Path, source: Path) -> None:
        """Show a tree of the host in the root; the guest can change nothing that is not its own."""
        self.trees[target] = self.clone(source).name
        self.host_trees[target] = source

    def own_tree(self, tree: Path) -> None:
        """The same, and the guest may change it, for itself alone."""
        name = f"t{len(self.clones)}"
        # Not what is mounted in it: that may be of a kind whose owners cannot be shown as others.
        self.clones.append(
            {"name": name, "path": name, "source": str(tree), "swap": self._swap(tree), "recursive": False}
        )
        self.trees[tree] = name
        self.host_trees[tree] = tree
        self.own.add(tree)

    def show(self, source: Path, target: Path) -> None:
        """As `tree`, by the name that `nvidia.Sight` has for it."""
        self.tree(target, source)

    def link(self, place: str, target: str) -> None:
        """Have a symbolic link there."""
        self.links[f"{ROOT}{place}"] = target

    def places(self) -> Collection[str]:
        """All that something is planned for."""
        made = (*self.directories, *self.files, *self.links)
        inside = (place.removeprefix(ROOT) for place in made if place.startswith(f"{ROOT}/"))
        return {*self.binds, *self.memories, *map(str, self.trees), *inside}

    def leads(self, place: str) -> str | None:
        """Where a link of the sandbox's own there leads to."""
        return self.links.get(f"{ROOT}{place}")

    def is_as_it_is(self, tree: Path) -> bool:
        """Whether a tree of the host's is in the root that the sandbox cannot change."""
        return tree in self.trees and tree not in self.own

    def bind(self, target: str, source: Path, *, mode: str) -> None:
        """A mount that leads to the host."""
        self.binds[target] = (source, mode)

    def memory(
        self, target: str, *, kind: str = "tmpfs", size_bytes: int | None = None, mode: str = "", owned: bool = False
    ) -> None:
        """A mount in the sandbox's memory."""
        options = ["nosuid", "nodev"]
        if size_bytes is not None:
            options.append(f"size={size_bytes}")
        if mode:
            options.append(f"mode={mode}")
        if owned:
            options += [f"uid={self.identity.uid}", f"gid={self.identity.gid}"]
        self.memories[target] = {"destination": target, "type": kind, "source": kind, "options": options}

    def file_system(self, name: str, *, size_bytes: int) -> None:
        """A file system in the host's memory; symbolic links on it do not work, since the host opens what is there."""
        owner = f"uid={self.identity.uid},gid={self.identity.gid}"
        options = f"mode=0700,size={size_bytes},nr_inodes={size_bytes // PAGE_BYTES},{owner}"
        self.file_systems.append({"path": name, "options": options, "follow": False})

    def overlay(self, tree: Path, *, size_bytes: int) -> Path:
        """The same, outside of the sandbox's memory, so that no image has what it changes; where the stage has it.

        Where the kernel refuses that, the report's `changes` says why.
        """
        lower = self.clone(tree, foreign=True)
        found = tree.stat()
        swapped = found.st_uid != self.identity.uid
        owner = (self.identity.uid, self.identity.gid) if swapped else (found.st_uid, found.st_gid)
        options = f"mode=0755,size={size_bytes},nr_inodes={max(1024, size_bytes // PAGE_BYTES)}"
        self.file_systems.append({"path": CHANGES, "options": options, "follow": True})
        self.directories[f"{CHANGES}/upper"] = (found.st_mode & 0o7777, owner)
        self.directories[f"{CHANGES}/work"] = (0o755, owner)
        self.overlays.append(
            {
                "name": CHANGES,
                "path": "changed",
                "lower": lower.name,
                "upper": f"{CHANGES}/upper",
                "work": f"{CHANGES}/work",
                "options": ",redirect_dir=off,index=off,metacopy=off",
            }
        )
        return lower

    def alias(self, path: Path) -> None:
        """A path, perhaps with symbolic links on the way, by which something is found too."""
        self.aliases.append(path)

    def is_covered(self, path: Path) -> bool:
        """Whether a place in the root cannot be seen, for a mount beside it."""
        return any(path.is_relative_to(mounted) for mounted in (*self.binds, *self.memories))

    def system(self) -> None:
        """The system's programs and libraries."""
        self.tree(Path("/usr"), Path("/usr"))
        for name in _TOP_LEVEL:
            path = Path("/", name)
            if path.is_symlink():
                self.links[f"{ROOT}/{name}"] = os.readlink(path)
            elif path.is_dir():
                self.tree(path, path)
        self.links[f"{ROOT}/var/tmp"] = "/tmp"
        self.links[f"{ROOT}/var/run"] = "/run"

    def configuration(self, made: Etc) -> None:
        """/etc."""
        for name, content in made.files.items():
            self.files[f"{ROOT}/etc/{name}"] = content
        for name, target in made.links.items():
            self.links[f"{ROOT}/etc/{name}"] = target
        for name, source in made.shown.items():
            self.trees[Path("/etc", name)] = self.clone(source).name

    def hide(self, paths: Sequence[Path]) -> None:
        """Cover what is the keeper's own where it would show through a workspace or a mount.

        Raises:
            InvalidRequestError: A mount lies in it.
        """
        for path in {path.resolve() for path in paths if path.is_dir()}:
            for target, source in list(self.host_trees.items()):
                if target in self.asked and (path == source or path in source.parents):
                    raise InvalidRequestError(f"{source} belongs to Warmcell itself", hint="Choose another directory.")
                if source in path.parents and target != Path(GUEST):
                    self.bind(str(target / path.relative_to(source)), self.base / _NOTHING, mode="ro")

    def stage_plan(self) -> Mapping[str, Any]:
        """What the stage is to make.

        Raises:
            InvalidRequestError: Something has no place in the tree that it lies in.
        """
        check_places(self.host_trees)
        self.link_aliases()
        trees = sorted(self.trees, key=lambda path: len(path.parts))
        places = [*self.directories, *self.files, *self.links, *(f"{ROOT}{path}" for path in trees)]
        directories = {_NOTHING: (0o755, None), ROOT: (0o755, None), **self.directories}
        below = [*places, *(f"{ROOT}{path}/." for path in (*self.binds, *self.memories))]
        # Hundreds of paths have few parents, and each start waits for this.
        for parent in {parent for path in below for parent in list(Path(path).parents)[:-1]}:
            inside = Path("/", parent.relative_to(ROOT)) if parent.is_relative_to(ROOT) else None
            if inside is None or not (str(parent) in self.links or _in_any(inside, trees)):
                directories.setdefault(str(parent), (0o755, None))
        mounted = {made["path"] for made in self.file_systems}
        files = {path for path in self.binds if self.binds[path][0].name in self._clones_of_files()}
        return {
            "base": str(self.base),
            "user_namespace": False,
            "file_systems": self.file_systems,
            "directories": [
                {"path": path, "mode": mode, "owner": owner}
                for path, (mode, owner) in sorted(directories.items(), key=lambda item: len(Path(item[0]).parts))
                if path not in mounted and not (path.startswith(ROOT) and path.removeprefix(ROOT) in files)
            ],
            "files": [{"path": path, "content": content} for path, content in self.files.items()],
            "links": [{"path": path, "target": target} for path, target in self.links.items()],
            "clones": self.clones,
            "fills": [],
            "overlays": self.overlays,
            "views": [
                {"of": self.trees[path], "path": f"{ROOT}{path}", "there": any(tree in path.parents for tree in trees)}
                for path in trees
            ],
            "run": "run",
        }

    def oci_mounts(self) -> list[Mapping[str, Any]]:
        """The mounts beside the root, parents first."""
        made = {
            target: {"destination": target, "type": "bind", "source": str(source), "options": [mode, "rbind"]}
            for target, (source, mode) in {**self.binds, **self._named_in_memory()}.items()
        }
        return [mount for _, mount in sorted({**self.memories, **made}.items(), key=lambda item: item[0].count("/"))]

    def _swap(self, source: Path) -> tuple[int, int, int, int] | None:
        found = source.stat()
        if found.st_uid == self.identity.uid:
            return None
        return found.st_uid, self.identity.uid, found.st_gid, self.identity.gid

    def link_aliases(self) -> None:
        """Plan the links by which what is shown is found by its other names."""
        taken = (*self.host_trees, *map(Path, self.memories), *map(Path, self.binds))
        for alias in self.aliases:
            for link, target in links_on(alias):
                if not _in_any(link, taken):
                    self.links.setdefault(f"{ROOT}{link}", target)

    def _named_in_memory(self) -> dict[str, tuple[Path, str]]:
        """Mounts in place of links that would lie in the sandbox's memory, where nobody can make them."""
        made = {}
        for alias in self.aliases:
            for link, _ in links_on(alias):
                in_memory = _in_any(link, list(map(Path, self.memories)))
                if not in_memory or _in_any(link, [*self.host_trees, *map(Path, self.binds)]):
                    continue
                real = link.resolve()
                for tree in filter(real.is_relative_to, self.host_trees):
                    source, mode = self.binds.get(str(tree)) or (self.base / self.trees[tree], "ro")
                    made[str(link)] = (source / real.relative_to(tree), mode)
        return made

    def _clones_of_files(self) -> set[str]:
        return {made["path"] for made in self.clones if os.path.isfile(made["source"])}


def _in_any(path: Path, trees: Sequence[Path]) -> bool:
    return not {path, *path.parents}.isdisjoint(trees)
