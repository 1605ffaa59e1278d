"""Whether an interpreter, or a package that its kernels can import, has changed, found by looking at few files.

A template has imported what was there when it was made. Nothing is executed here, as in `environment`.
"""

import ast
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from warmcell.sandbox.backends.environment import SYSTEM, virtual_environment
from warmcell.sandbox.plain_files import read_plain

PACKAGE_DATABASES = (Path("/var/lib/dpkg/status"), Path("/var/lib/rpm/rpmdb.sqlite"))
"""What a distribution's package manager writes with each package that it changes."""

SOURCES_MAX = 5_000
"""Files of an editable package that are looked at."""

POINTER_MAX_BYTES = 2**20
"""Of what names editable packages. Packages put there what they like."""

_MAPPING = re.compile(r"^MAPPING\b[^=]*=\s*(\{.*\})\s*$", re.MULTILINE)
"""In the module by which setuptools finds an editable package: its name and directory."""


def fingerprint(python: str, preload: Sequence[str] = ()) -> str:
    """Another one where the interpreter, or a package of its environment, has changed. Blocks.

    Args:
        python: The interpreter's path.
        preload: What templates import. Of these the sources are looked at, where they are installed as editable.
    """
    names = [name for name in dict.fromkeys(one.partition(".")[0] for one in preload) if name.isidentifier()]
    found: list[object] = []
    for place in (Path(python).resolve(), *_places(Path(python))):
        found += _seen(place)
        if not place.is_dir():
            continue
        pointers = sorted(place.glob("*.pth"))
        for path in (*(place / name for name in names), *pointers):  # A package may be replaced where it is.
            found += _seen(path)
        for source in _sources(place, pointers, names):
            found += _seen(source)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _places(python: Path) -> list[Path]:
    """Directories of packages, and what says that a distribution's have changed."""
    venv, settings = virtual_environment(python)
    prefix = python.parent.parent
    places = _below(prefix)
    system = venv is None
    if venv is not None and settings.get("include-system-site-packages", "").lower() == "true":
        system = True
        prefix = Path(settings.get("home", "/")).parent
        places += _below(prefix)
    if system and prefix.resolve() == SYSTEM:
        places += PACKAGE_DATABASES
    return places


def _below(prefix: Path) -> list[Path]:
    """Debian has two directories of its own, and one for what is installed by hand."""
    return sorted(
        place
        for pattern in ("lib*/python3*/site-packages", "lib*/python3*/dist-packages", "local/lib/python3*/*-packages")
        for place in prefix.glob(pattern)
    )


def _sources(place: Path, pointers: Sequence[Path], names: Sequence[str]) -> Iterator[Path]:
    """Files of those of these packages that lie elsewhere, where they are being worked on."""
    for pointer in pointers if names else ():
        with contextlib.suppress(OSError):
            for line in read_plain(pointer, most_bytes=POINTER_MAX_BYTES).decode(errors="replace").splitlines():
                if line.startswith("/"):
                    for name in names:
                        yield from _files(Path(line) / name)
                elif line.startswith("import __editable___"):
                    finder = line.removeprefix("import ").partition(";")[0].strip()
                    for mapped, directory in _mapped(place / f"{finder}.py").items():
                        if mapped.partition(".")[0] in names:
                            yield from _files(Path(directory))


def _mapped(finder: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, SyntaxError):
        match = _MAPPING.search(read_plain(finder, most_bytes=POINTER_MAX_BYTES).decode(errors="replace"))
        mapping = ast.literal_eval(match[1]) if match else {}
        return {str(name): str(directory) for name, directory in mapping.items()}
    return {}


def _files(package: Path) -> Iterator[Path]:
    """All modules of a package, or the one file that it is."""
    if not package.is_dir():
        yield package.with_suffix(".py")
        return
    seen = 0
    for directory, names, files in os.walk(package):
        names[:] = sorted(name for name in names if name != "__pycache__" and not name.startswith("."))
        for name in sorted(files):
            if name.endswith((".py", ".so")):
                seen += 1
                if seen > SOURCES_MAX:
                    return
                yield Path(directory, name)


def _seen(path: Path) -> list[object]:
    """What is told of a file or directory that changes with it; nothing of one that is not there."""
    try:
        found = path.stat()
    except OSError:
        return []
    size = 0 if path.is_dir() else found.st_size
    return [str(path), found.st_ino, found.st_mtime_ns, size]
