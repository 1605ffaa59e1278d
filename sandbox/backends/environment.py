"""What of the host a Python environment consists of, found by looking, never by running it.

An interpreter that a guest could have written must not run on the host, so nothing is executed here.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.plain_files import read_plain

SYSTEM = Path("/usr")
"""Shown whole in every sandbox."""
SETTINGS_MAX_BYTES = 2**16
"""Of pyvenv.cfg, which what was installed there may have written."""
_HOW = "Give the path that `python -c 'import sys; print(sys.executable)'` prints in that environment."


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonEnvironment:
    """Directories of one interpreter, all by their real paths."""

    python: Path
    """As asked for; it is under this path in the guest as well."""
    version: str
    """As in "3.11"."""
    layered: Path | None
    """The tree that packages are installed into. None: the system's, which a guest cannot write."""
    trees: tuple[Path, ...]
    """Further trees that it needs, read-only; none lies below another or below /usr."""
    names: tuple[Path, ...]
    """Paths, perhaps with symbolic links in them, by which it finds itself."""

    @property
    def site_packages(self) -> Path | None:
        """Where pip installs to; None for the system's Python."""
        if self.layered is None:
            return None
        if self.layered.name == f"python{self.version}":
            return self.layered / "site-packages"
        return self.layered / "lib" / f"python{self.version}" / "site-packages"


def discover(python: str) -> PythonEnvironment:
    """The environment that an interpreter belongs to.

    Raises:
        InvalidRequestError: There is no such interpreter, or it is a script that starts one.
    """
    path = Path(python)
    if not path.is_absolute():
        raise InvalidRequestError(f"The interpreter {python!r} is not an absolute path", hint=_HOW)
    if not os.access(path, os.X_OK) or not path.is_file():
        raise InvalidRequestError(f"There is no interpreter {python}", hint=_HOW)
    real = path.resolve()
    with real.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            raise InvalidRequestError(
                f"{python} is a script that starts an interpreter, not the interpreter", hint=_HOW
            )
    if not real.name.startswith("python"):
        raise InvalidRequestError(f"{python} is not a CPython interpreter", hint=_HOW)
    venv, settings = virtual_environment(path)
    base_start = Path(settings["home"]).resolve() if "home" in settings else real.parent
    base, version = _base(real, base_start)
    if venv is None:
        found = [base]
        layered = base
    else:
        found = [venv, base]
        layered = venv
    trees = [tree for prefix in found for tree in _trees_of(prefix, version)]
    trees.append(real.parent)
    if str(real).startswith("/nix/store/"):
        trees.append(Path("/nix/store"))
    layered_tree = None if _below(layered, SYSTEM) and venv is None else _trees_of(layered, version)[-1]
    return PythonEnvironment(
        python=path,
        version=version,
        layered=layered_tree,
        trees=tuple(_outermost([tree for tree in trees if not _below(tree, SYSTEM)], apart_from=layered_tree)),
        names=(path, Path(settings["home"])) if "home" in settings else (path,),
    )


def virtual_environment(python: Path) -> tuple[Path | None, dict[str, str]]:
    """The virtual environment that `python` is in, by the rule of the interpreter itself, and its settings."""
    for directory in (python.parent, python.parent.parent):
        try:
            text = read_plain(directory / "pyvenv.cfg", most_bytes=SETTINGS_MAX_BYTES).decode(errors="replace")
        except OSError:
            continue
        pairs = (line.partition("=") for line in text.splitlines())
        return directory.resolve(), {key.strip().lower(): value.strip() for key, _, value in pairs}
    return None, {}


def _base(real: Path, start: Path) -> tuple[Path, str]:
    """The prefix of the interpreter proper, and its version."""
    named = re.match(r"python(3\.\d+)", real.name)
    for origin in (start, real.parent):
        for prefix in (origin, *origin.parents):
            for library in ("lib", "lib64"):
                if named and (prefix / library / f"python{named[1]}" / "os.py").exists():
                    return prefix, named[1]
                versions = [] if named else sorted((prefix / library).glob("python3.*/os.py"))
                if versions:
                    return prefix, versions[-1].parent.name.removeprefix("python")
    raise InvalidRequestError(f"The standard library of {real} was not found", hint=_HOW)


def _trees_of(prefix: Path, version: str) -> list[Path]:
    """What belongs to an installation below `prefix`, the tree for packages last.

    That is all of it, unless other things live there as well: ~/.local, say, holds keys and histories too.
    """
    home = Path.home().resolve()
    shared = _below(home, prefix) or prefix in (home / ".local", Path("/opt"), Path("/usr/local"))
    if not shared:
        return [prefix]
    library = prefix / "lib"
    parts = [prefix / "bin", prefix / "include" / f"python{version}", *library.glob("libpython3*")]
    return [part for part in parts if part.exists()] + [library / f"python{version}"]


def _outermost(trees: list[Path], *, apart_from: Path | None) -> list[Path]:
    """Those that no other one contains, without `apart_from` itself."""
    kept: list[Path] = []
    for tree in sorted(set(trees), key=lambda path: len(path.parts)):
        others = [*kept, apart_from] if apart_from is not None else kept
        if not any(_below(tree, other) for other in others):
            kept.append(tree)
    return kept


def _below(path: Path, ancestor: Path) -> bool:
    return path == ancestor or ancestor in path.parents
