"""The notebook's own modules: .py files of its folder, as both sides have imported them.

A rank has the folder too, but not what has been changed there since it imported a module; and in some sandboxes it has
no folder at all. So the sources travel, and what is old is loaded again.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import os
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from typing import Any

SOURCE_MAX_BYTES = 1024 * 1024
ALL_MAX_BYTES = 8 * 1024 * 1024

_sources: dict[str, tuple[str, str]] = {}
"""Module to file and source, as they were sent last."""

_elsewhere: dict[str, set[str]] = {}
"""Folder to files that are none of its sources: a kernel has a thousand of them, and each cell asks."""

_taken: dict[str, str] = {}
"""Module to the digest of what it was loaded from here."""


def give(folder: str) -> dict[str, tuple[str, str]]:
    """The modules of `folder` that are imported here: name to file and source. Blocks."""
    found: dict[str, tuple[str, str]] = {}
    elsewhere = _elsewhere.setdefault(folder, set())
    left = ALL_MAX_BYTES
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or file in elsewhere or name in ("__main__", "__mp_main__"):
            continue
        path = os.path.realpath(file)
        if not _is_own(path, folder):
            elsewhere.add(file)
            continue
        try:
            if os.path.getsize(path) > min(SOURCE_MAX_BYTES, left):
                continue
            with open(path, encoding="utf-8") as opened:
                source = opened.read()
        except (OSError, UnicodeDecodeError):
            continue
        left -= len(source)
        found[name] = (file, source)
    return dict(sorted(found.items()))


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
    """Have these modules here: found where nobody else finds them, and loaded again where they have changed."""
    if not given:
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    for name, (file, source) in given.items():
        _sources[name] = (file, source)
        mark = hashlib.sha256(source.encode()).hexdigest()
        module = sys.modules.get(name)
        if module is not None and _taken.get(name, mark) != mark:
            linecache.checkcache()
            importlib.invalidate_caches()
            _execute(name, vars(module))
        _taken[name] = mark


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
