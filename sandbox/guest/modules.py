"""The notebook's own modules: .py files of its folder, as both sides have imported them.

A rank has the folder too, but not what has been changed there since it imported a module; and in some sandboxes it has
no folder at all. So the sources travel, and what is old is loaded again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import linecache
import os
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from typing import Any

SOURCE_MAX_BYTES = 1024 * 1024
ALL_MAX_BYTES = 8 * 1024 * 1024

_sources: dict[str, tuple[str, str]] = {}
"""Module to file and source, as they were sent last."""

_looked: dict[str, tuple[dict[str, object], list[str]]] = {}
"""Folder to all modules when they were last looked at, and the names of its own: each cell asks, of two thousand."""

_taken: dict[str, str] = {}
"""Module to the digest of what it was loaded from here."""


_imports: dict[str, tuple[str, frozenset[str]]] = {}
"""File to the digest of its source, and what that imports."""


def give(folder: str, wanted: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """The modules of `folder` that are imported here, or are about to be there: name to file and source. Blocks.

    Args:
        folder: The notebook's.
        wanted: Dotted names that a cell imports; those of other folders, and such as are no modules, are left out.
    """
    found: dict[str, tuple[str, str]] = {}
    left = ALL_MAX_BYTES
    for name in _own_of(folder):
        file = str(getattr(sys.modules.get(name), "__file__", ""))
        source = _read(os.path.realpath(file), left)
        if source is None:
            continue
        left -= len(source)
        found[name] = (file, source)
    queue = [part for name in wanted for part in _with_parents(name)]
    while queue:
        name = queue.pop()
        if name in found or name.partition(".")[0] in sys.modules.keys() - found.keys():
            continue
        file = _file_of(name, folder)
        source = _read(file, left) if file else None
        if source is not None:
            left -= len(source)
            found[name] = (file, source)
            queue += [part for one in _imported_by(name, file, source) for part in _with_parents(one)]
    return dict(sorted(found.items()))


def _own_of(folder: str) -> list[str]:
    """The names of modules that are of the folder; only those are looked at that were not there before."""
    seen, own = _looked.get(folder, ({}, []))
    now: dict[str, object] = dict(sys.modules)
    if now != seen:  # By identity first, so this takes microseconds.
        own = [name for name in own if now.get(name) is seen[name]]
        own += [name for name, module in now.items() if seen.get(name) is not module and _is_of(name, module, folder)]
        _looked[folder] = now, own
    return own


def _is_of(name: str, module: object, folder: str) -> bool:
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or name in ("__main__", "__mp_main__"):
        return False
    return _is_own(os.path.realpath(file), folder)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _file_of(name: str, folder: str) -> str:
    """Where its source is, if that is in the folder; found without importing anything. Empty: it is not there."""
    inside = os.path.realpath(folder)
    for entry in dict.fromkeys((folder, *sys.path)):
        base = os.path.realpath(entry or folder)
        if base != inside and not base.startswith(inside + os.sep):
            continue
        path = os.path.join(base, *name.split("."))
        for file in (os.path.join(path, "__init__.py"), f"{path}.py"):
            if os.path.isfile(file) and _is_own(file, folder):
                return file
    return ""


def _read(file: str, most: int) -> str | None:
    """The source; None where it cannot be read, or is too long."""
    try:
        if os.path.getsize(file) > min(SOURCE_MAX_BYTES, most):
            return None
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError):
        return None


def _imported_by(name: str, file: str, source: str) -> frozenset[str]:
    """Dotted names of what may be modules among what a module imports, wherever in it that is written."""
    mark = hashlib.sha256(source.encode()).hexdigest()
    known = _imports.get(file)
    if known is not None and known[0] == mark:
        return known[1]
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # It will say so itself.
        return frozenset()
    package = name.split(".") if os.path.basename(file) == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.update(f"{base}.{one.name}" if base else one.name for one in node.names if one.name != "*")
            if base:
                found.add(base)
    _imports[file] = (mark, frozenset(found))
    return _imports[file][1]


def _is_own(path: str, folder: str) -> bool:
    """Whether this is a source of the folder's, and of no environment in it."""
    inside = os.path.realpath(folder) + os.sep
    within = path[len(inside) :] if path.startswith(inside) else ""
    if not within or not path.endswith(".py"):
        return False
    if "site-packages" in within or within.startswith((".", "lib/python")):
        return False
    return not any(path.startswith(os.path.realpath(prefix) + os.sep) for prefix in (sys.prefix, sys.base_prefix))


def digest(given: Mapping[str, tuple[str, str]]) -> str:
    """The same for the same modules."""
    return hashlib.sha256(repr(sorted(given.items())).encode()).hexdigest()


def take(given: Mapping[str, Any]) -> None:
    """Have these modules here: found where nobody else finds them, and loaded again where they may be old.

    Those that import each other are loaded in whatever order works. One that fails stays as it was, and says so.
    """
    if not given:
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    marks = {name: hashlib.sha256(source.encode()).hexdigest() for name, (_, source) in given.items()}
    _sources.update((name, (file, source)) for name, (file, source) in given.items())
    # One that is loaded and that nobody has told us of may be of any age.
    old = [name for name in given if name in sys.modules and _taken.get(name) != marks[name]]
    _taken.update(marks)
    if old:
        linecache.checkcache()
        importlib.invalidate_caches()
    while old:
        failed: dict[str, Exception] = {}
        for name in old:
            try:
                _execute(name, vars(sys.modules[name]))
            except Exception as error:
                failed[name] = error
        if len(failed) == len(old):
            for name, why in failed.items():
                sys.stderr.write(f"The module {name} could not be loaded again: {type(why).__name__}: {why}\n")
            return
        old = list(failed)


def _execute(name: str, names: dict[str, Any]) -> None:
    file, source = _sources[name]
    exec(compile(source, file, "exec"), names)  # noqa: S102 - by design: the notebook's own code.


class _Finder:
    """The last in the list, and its own loader."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _sources:
            return None
        file, _ = _sources[name]
        package = os.path.basename(file) == "__init__.py"
        spec = ModuleSpec(name, self, origin=file, is_package=package)  # type: ignore[arg-type]
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind."""

    def exec_module(self, module: Any) -> None:
        _execute(module.__name__, vars(module))
