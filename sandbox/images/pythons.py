"""Which interpreter of this machine an environment is made from, and whether uv is there. Nothing is run here."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from warmcell.sandbox.backends.environment import discover
from warmcell.sandbox.errors import InvalidRequestError

_MANAGED = {
    False: (".pyenv/versions/{version}.*/bin", ".local/share/uv/python/cpython-{version}.*/bin"),
    True: (".pyenv/versions/{version}/bin", ".local/share/uv/python/cpython-{version}-*/bin"),
}
"""Below the home directory, where pyenv and uv put interpreters; by whether an exact version is asked for."""


def own_python() -> Path:
    """The interpreter proper that runs this, outside of any virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def find_python(version: str) -> Path | None:
    """An interpreter of that version: "3.12", or "3.12.4" exactly. Blocks.

    Of an exact version only one is found whose folder says it.
    """
    short = ".".join(version.split(".")[:2])
    for place in _places(version, short):
        try:
            real = place.resolve()
            if discover(str(real)).version == short:
                return real
        except (InvalidRequestError, OSError):
            continue  # A script that chooses one, say.
    return None


def _places(version: str, short: str) -> Iterator[Path]:
    exact = version != short
    if not exact:
        yield own_python()
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
            if os.path.isabs(folder):
                yield Path(folder, f"python{short}")
    for pattern in _MANAGED[exact]:
        for directory in sorted(Path.home().glob(pattern.format(version=version))):
            yield directory / f"python{short}"


def find_uv() -> Path | None:
    """uv beside the interpreter that runs this, else on PATH. Blocks."""
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("uv")
    if found is None:
        return None
    real = Path(found).resolve()
    with real.open("rb") as file:
        return real if file.read(4) == b"\x7fELF" else None
