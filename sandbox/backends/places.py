"""Places in a sandbox: what is its own wherever it runs on the host's files, and what may be put beside it."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import MIB, Limits, Mount, SandboxSpec
from warmcell.sandbox.paths import Paths, private_directory

RUN = "/run/warmcell"
GUEST = "/warmcell"
IMAGES = "/.warmcell"
RUN_BYTES = 64 * MIB
"""Size of a run directory without values."""

LANG = "C.UTF-8"
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"

RESERVED = ("/etc", "/proc", "/sys", "/dev", GUEST, IMAGES, RUN)
"""A sandbox's own, with all that is below."""
ESSENTIAL = ("/usr", "/run", *RESERVED)
"""What nothing may be put over."""


def run_bytes(limits: Limits) -> int:
    """Size of a run directory: values that are sent are in it, as other shared memory is in /dev/shm.

    There is room for what ranks have, for what takes its place, and for what comes back; it is taken as it is used.
    """
    return RUN_BYTES + 3 * limits.shm_bytes


def workspace_of(spec: SandboxSpec) -> Path | None:
    """The real path of the folder, if there is to be one."""
    if spec.workspace is None or spec.workspace.mode == "none":
        return None
    path = Path(spec.workspace.path)
    if not path.is_absolute():
        raise InvalidRequestError(f"The workspace {str(path)!r} is not an absolute path", hint="Give an absolute path.")
    if not path.is_dir():
        raise InvalidRequestError(f"The workspace {path} is not a directory", hint="Create it, or choose another one.")
    check_target(path, what="workspace")
    real = path.resolve()
    check_target(real, what="workspace")
    return real


USUAL_HOME = "/home/user"
"""Where programs that are written for other sandboxes look for their home."""


def leads_home(home: str, trees: Iterable[Path]) -> bool:
    """Whether `USUAL_HOME` can be a link to the home: nothing else is there, or below it.

    Args:
        home: Where it is.
        trees: What is shown of the host, as the guest sees it.
    """
    usual = Path(USUAL_HOME)
    return not any(path.is_relative_to(usual) or usual.is_relative_to(path) for path in [*trees, Path(home)])


def home_path(spec: SandboxSpec, workspace: Path | None, identity: Identity) -> str:
    """/home/NAME, unless the workspace or a mount is there."""
    taken = [Path(mount.target or mount.source) for mount in spec.mounts]
    if workspace is not None:
        taken.append(workspace)
    candidates = [
        f"/home/{identity.name}",
        "/home/warmcell",
        f"/var/home/{identity.name}",
        "/var/home/warmcell",
    ]
    return next(
        (path for path in candidates if not any(Path(path).is_relative_to(other) for other in taken)),
        candidates[-1],
    )


def persistent_home(paths: Paths, identity: Identity, *, as_root: bool) -> Path:
    """The directory on disk that holds the guest's home; root's guests own theirs below root's own directory."""
    path = private_directory(paths.state / "homes") / identity.name
    if not as_root:
        return private_directory(path)
    path.mkdir(mode=0o700, exist_ok=True)
    os.chown(path, identity.uid, identity.gid, follow_symlinks=False)
    return path


def below(path: Path, tree: Path) -> bool:
    """Whether a path lies below another one, by their names. As `tree in path.parents`, which makes each of these."""
    parts = tree.parts
    return len(path.parts) > len(parts) and path.parts[: len(parts)] == parts


def check_target(path: Path, *, what: str) -> None:
    """Refuse a place in the guest that is its own.

    Raises:
        InvalidRequestError: `path` covers, or lies in, what every sandbox needs.
    """
    text = str(path)  # Comparing paths as such takes a hundred times as long.
    covers = text == "/" or any(own == text or own.startswith(f"{text}/") for own in ESSENTIAL)
    lies_in = any(text.startswith(f"{own}/") for own in RESERVED)
    if covers or lies_in:
        raise InvalidRequestError(f"{path} cannot be a {what}: a sandbox has its own", hint="Choose another directory.")


def mount_of(mount: Mount) -> tuple[Path, Path, Path | None]:
    """The real path of what a spec wants mounted, where it goes, and by which path it was named if that is another.

    Raises:
        InvalidRequestError: It does not exist, or would cover or lie in what a sandbox needs.
    """
    source, target = Path(mount.source), Path(mount.target or mount.source)
    if not source.is_absolute() or not target.is_absolute() or ".." in target.parts:
        raise InvalidRequestError(f"The mount {mount.source!r} is not absolute", hint="Give absolute paths.")
    if not source.exists():
        raise InvalidRequestError(f"The mount {source} does not exist", hint="Create it, or leave the mount out.")
    check_target(target, what="mount")
    real = source.resolve()
    if mount.target:
        return real, target, None
    check_target(real, what="mount")
    return real, real, source


def in_any(path: str, trees: Sequence[str]) -> bool:
    """Whether a path is one of these, or lies in one, by their names."""
    return any(path == tree or path.startswith(f"{tree}/") for tree in trees)


def check_places(trees: Mapping[Path, Path]) -> None:
    """What lies in a tree of the host must have a place there already, and no link on the way: none is made on the
    host, and none that somebody could change is followed.

    Args:
        trees: Path in the sandbox to path on the host.

    Raises:
        InvalidRequestError: Something has none.
    """
    known = {str(tree): tree for tree in trees}
    for target in trees:
        nearest = next((known[str(way)] for way in target.parents if str(way) in known), None)
        if nearest is None:
            continue
        place = trees[nearest].resolve() / target.relative_to(nearest)
        if not place.exists():
            raise InvalidRequestError(
                f"{target} lies in {nearest}, which has no such place",
                hint=f"Create {target.name} there first, or choose another target for the mount.",
            )
        if (real := place.resolve()) != place:
            raise InvalidRequestError(
                f"{target} lies in {nearest}, where a link leads to {real}",
                hint="Give a target that has no link on its way.",
            )


def links_on(path: Path) -> Iterator[tuple[Path, str]]:
    """Each symbolic link on the way along `path`, with what it says."""
    left = list(path.parts[1:])
    here = Path("/")
    for _ in range(255):
        if not left:
            return
        step = Path(os.path.normpath(here / left.pop(0)))
        if step.is_symlink():
            target = os.readlink(step)
            yield step, target
            left = [part for part in Path(target).parts if part != "/"] + left
            here = Path("/") if target.startswith("/") else here
        else:
            here = step


def variables(identity: Identity, *, home: str, python: Path) -> dict[str, str]:
    """The environment that a sandbox begins with."""
    return {
        "PATH": f"{python.parent}:{SEARCH_PATH}",
        "HOME": home,
        "USER": identity.name,
        "LOGNAME": identity.name,
        "SHELL": "/bin/bash",
        "LANG": LANG,
        "TMPDIR": "/tmp",
    }
