"""Kernels' environments of other versions of Python, made of the interpreters that this machine happens to have."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.lanes import TOP
from warmcell.kernel_provisioner.kernelspecs import OLDEST_PYTHON

MADE = TOP / ".cache" / "pythons"
"""They are kept, so that only the first run asks the package index."""

MAKE_TIMEOUT_S = 300.0
_ASK = "import ssl, sys, venv; print(*sys.version_info[:2], sys.version_info.releaselevel, sys.implementation.name)"
_NEWEST_ASKED = 20


def others() -> dict[tuple[int, int], Path]:
    """Interpreters of other versions than this one that kernels may have, oldest first; the first found of each."""
    found: dict[tuple[int, int], Path] = {}
    for path in _candidates():
        version = _version(path)
        if version is not None and version >= OLDEST_PYTHON and version != sys.version_info[:2]:
            found.setdefault(version, path)
    return dict(sorted(found.items()))


def environment(version: tuple[int, int], interpreter: Path) -> tuple[Path, str]:
    """The Python of an environment with ipykernel and nothing of ours, and else why it cannot be had."""
    directory = MADE / ".".join(map(str, version))
    python = directory / "bin" / "python"
    MADE.mkdir(parents=True, exist_ok=True)
    with (MADE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / "complete").exists() and _version(python) == version:
            return python, ""
        shutil.rmtree(directory, ignore_errors=True)
        uv = [sys.executable, "-m", "uv", "--quiet"]
        for command in (
            [*uv, "venv", "--python", interpreter, directory],
            [*uv, "pip", "install", "--python", python, "ipykernel"],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_TIMEOUT_S, check=False)
            except subprocess.TimeoutExpired:
                return python, f"{MAKE_TIMEOUT_S:.0f} s were not enough for {' '.join(map(str, command))}"
            if done.returncode != 0:
                said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
                return python, f"{' '.join(map(str, command))}: {said[-1]}"
        (directory / "complete").touch()
    return python, ""


def _candidates() -> Iterator[Path]:
    """Whatever may be an interpreter: what an operator names, on PATH, pyenv's, uv's."""
    for named in os.environ.get("WARMCELL_TEST_PYTHONS", "").split(os.pathsep):
        if named:
            yield Path(named)
    for minor in range(OLDEST_PYTHON[1], _NEWEST_ASKED):
        on_path = shutil.which(f"python3.{minor}")
        if on_path is not None:
            yield Path(on_path)
    yield Path("/usr/bin/python3")
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for folder in (pyenv, Path("~/.local/share/uv/python").expanduser()):
        yield from sorted(folder.glob("*/bin/python3"))


def _version(path: Path) -> tuple[int, int] | None:
    """Its version, if it runs, is a release of CPython's and can make environments; a shim of pyenv's may not."""
    try:
        said = subprocess.run([path, "-I", "-c", _ASK], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    major, minor, level, name = said.split()
    return (int(major), int(minor)) if (level, name) == ("final", "cpython") else None
