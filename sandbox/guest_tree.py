"""The guest tree as sandboxes see it: our files, compiled for this Python, with the carried cloudpickle.

It is a copy in the state directory, named by its content, so that it can be compiled although the package may not be
writable, and so that an upgrade of the package changes nothing under running sandboxes.
"""

import compileall
import hashlib
import os
import py_compile
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from warmcell.sandbox.paths import Paths, cannot_write, private_directory

SOURCE = Path(__file__).resolve().parent / "guest"
MOUNTED_AT = "/warmcell"
"""Where sandboxes have it, for tracebacks."""

SUFFIXES = (".py", ".R", ".bash", ".java", ".js")
"""Besides Python, drivers of the interpreters of other languages."""

_made: dict[Path, Path] = {}


def guest_tree(paths: Paths | None = None) -> Path:
    """The tree for sandboxes of this Warmcell, made where it is not there yet. Blocks for some 0.2 s then.

    A sandbox with another version of Python reads the same sources without the compiled files.

    Raises:
        WarmcellError: It cannot be written.
    """
    directory = (paths or Paths.default()).state / "guest"
    made = _made.get(directory)
    if made is None or not made.is_dir():
        try:
            made = _made[directory] = _make(directory)
        except OSError as error:
            raise cannot_write(directory, "WARMCELL_STATE_DIR", error) from error
    return made


def _make(directory: Path) -> Path:
    files = _files()
    digest = hashlib.sha256(repr((sys.version, sys.implementation.cache_tag)).encode())
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    target = directory / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    private_directory(directory)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
    try:
        for name, path in files.items():
            copy = work / "tree" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        compileall.compile_dir(
            work / "tree",
            quiet=2,
            stripdir=str(work / "tree"),
            prependdir=MOUNTED_AT,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        # Guests may run under another uid.
        for folder, _, names in os.walk(work / "tree"):
            os.chmod(folder, 0o755)  # noqa: S103
            for name in names:
                os.chmod(os.path.join(folder, name), 0o644)
        try:
            (work / "tree").rename(target)
        except OSError:
            if not target.is_dir():  # Else somebody else was quicker.
                raise
    finally:
        shutil.rmtree(work)
    return target


def _files() -> dict[str, Path]:
    """Name in the tree to file."""
    files = {str(path.relative_to(SOURCE)): path for path in SOURCE.rglob("*") if path.suffix in SUFFIXES}
    found = find_spec("cloudpickle")
    if found is not None and found.origin is not None:
        package = Path(found.origin).parent
        files |= {f"carried/cloudpickle/{path.name}": path for path in package.glob("*.py")}
        for path in package.parent.glob("cloudpickle-*.dist-info/**/LICENSE*"):
            files["carried/cloudpickle/LICENSE"] = path
    return files
