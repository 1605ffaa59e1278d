"""What a container shows: memory of its own, trees of the host, and a folder that it may change for itself alone."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.docker import changes
from warmcell.sandbox.backends.docker.about import EngineInfo
from warmcell.sandbox.backends.docker.changes import Changes
from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.backends.layers import Part
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import SandboxSpec

PAGE_BYTES = 4096
RECURSIVELY_READ_ONLY = (1, 44)
"""API from which a read-only mount of Docker's has no writable ones below it. Podman promises none."""
_FOR_OTHERS = {False: 0o004, True: 0o001}
"""Rights that somebody else needs to read a file, and to enter a directory."""
_NO_COPY = (
    "read-only: an engine of containers makes no copy-on-write view of a folder, and Warmcell can only as root. "
    "Choose mode rw or ro."
)
_NOT_OVER_MOUNTS = "read-only, since {} lies in it, which a copy-on-write view of it would hide. Choose mode rw or ro."


@dataclass(slots=True)
class Files:
    """What the container shows of the host, while it is being planned."""

    identity: Identity
    info: EngineInfo
    trees: dict[Path, Path] = field(default_factory=dict)
    writable: set[Path] = field(default_factory=set)
    memory: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def own(
        self,
        place: str,
        *,
        size_bytes: int,
        mode: str,
        options: str,
        part: str = "",
        at: str = "",
        of_root: bool = False,
    ) -> None:
        """A file system in memory that is the guest's, unless it is root's; `at`: where links lead from `place`."""
        most = max(1024, size_bytes // PAGE_BYTES)
        if self.info.podman:
            more = f"notmpcopyup,mode={mode}{'' if of_root else ',U'}"  # It takes no number, but knows its user.
        else:
            owner = "uid=0,gid=0" if of_root else f"uid={self.identity.uid},gid={self.identity.gid}"
            more = f"nr_inodes={most},mode={mode},{owner}"
        self.memory[place] = f"rw,nosuid,nodev,{options},size={size_bytes},{more}"
        if part:
            self.parts[part] = Part(place=(at or place).lstrip("/"), most_bytes=size_bytes, most_entries=most)

    def show(self, source: Path, target: Path, *, mode: str) -> None:
        """A tree of the host, writable only where the guest is whose files they are."""
        found = source.stat()
        if os.getuid() == 0 == found.st_uid and found.st_mode & _FOR_OTHERS[source.is_dir()] == 0:
            raise InvalidRequestError(
                f"{source} can be read by root alone, who is not let into a sandbox",
                hint="Give it to an ordinary user (chown -R USER), or use the bubblewrap backend.",
            )
        if mode == "rw" and (why := self._why_not_writable(found.st_uid)):
            self.notes.append(f"{source} is read-only, since {why}.")
            mode = "ro"
        self.trees[target] = source
        if mode == "rw":
            self.writable.add(target)

    def _why_not_writable(self, owner: int) -> str:
        if owner == 0 and os.getuid() == 0:
            return (
                "its files belong to root, who is not let into a sandbox. Give the folder to an ordinary user "
                "(chown -R USER), or use the bubblewrap backend, which can show them as the guest's"
            )
        return ""

    def named(self, path: Path, real: Path) -> None:
        """Show a tree under another path as well, by which it was asked for."""
        if path != real and not any(path.is_relative_to(tree) for tree in self.trees):
            self.trees[path] = self.trees[real]
            if real in self.writable:
                self.writable.add(path)

    def copied(self, spec: SandboxSpec, workspace: Path | None) -> tuple[str, ...]:
        """Where a workspace is shown that the sandbox may change for itself alone; nowhere where it cannot be had."""
        if workspace is None or spec.workspace is None or spec.workspace.mode != "cow":
            return ()
        if os.getuid() != 0:
            self.notes.append(_NO_COPY)
            return ()
        if why := self._why_not_writable(workspace.stat().st_uid):
            self.notes.append(f"{workspace} is read-only, since {why}.")
            return ()
        places = [str(place) for place in self.trees] + list(self.memory)
        below = [place for place in places if workspace in Path(place).parents]
        if below:
            self.notes.append(_NOT_OVER_MOUNTS.format(below[0]))
            return ()
        return tuple(
            dict.fromkeys(str(place) for place in (workspace, Path(spec.workspace.path)) if place in self.trees)
        )

    def change(self, made: Changes, workspace: Path, *, layer_bytes: int) -> None:
        """What an overlay over the workspace is made of."""
        self.own(changes.PLACE, size_bytes=made.size_bytes, mode="0700", options="exec", of_root=True)
        self.trees[Path(changes.LOWER)] = workspace
        self.parts[changes.PART] = changes.part(layer_bytes=layer_bytes, above=made.saved != "")

    def mounts(self) -> list[Mapping[str, Any]]:
        """As the engine takes them."""
        made = []
        for target, source in self.trees.items():
            read_only = target not in self.writable
            flat = read_only and (self.info.podman or self.info.api < RECURSIVELY_READ_ONLY)
            made.append(bind(source, str(target), read_only=read_only, flat=flat))
        return made


def bind(source: Path, target: str, *, read_only: bool = True, flat: bool = False) -> Mapping[str, Any]:
    """A path of the host in a container.

    Args:
        source: On the host; it must be there.
        target: In the container.
        read_only: Whether it cannot be written.
        flat: Without what is mounted below it.
    """
    return {
        "Type": "bind",
        "Source": str(source),
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate", "NonRecursive": flat},
    }
