"""The notebook's own modules: .py files of its folder, and of those that it has added to `sys.path`.

A rank has the folder too, but not what has been changed there since it imported a module; the others, and in some
sandboxes that one, it has not at all. So the sources travel, and what is old is loaded again.
"""

from __future__ import annotations

import ast
import functools
import glob
import hashlib
import importlib
import linecache
import os
import site
import sys
import types
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from typing import Any

SOURCE_MAX_BYTES = 1024 * 1024
ALL_MAX_BYTES = 8 * 1024 * 1024

_sources: dict[str, tuple[str, str]] = {}
"""Module to file and source, as they were sent last."""

_looked: dict[tuple[str, ...], tuple[dict[str, object], list[str]]] = {}
"""Folders to all modules when they were last looked at, and the names of their own: each cell asks, of two thousand."""

_were: dict[str, None] = {}
"""Where the notebook was, in order: modules stay its own when it goes elsewhere."""

_taken: dict[str, str] = {}
"""Module to the digest of what it was loaded from here."""


_imports: dict[str, tuple[str, frozenset[str]]] = {}
"""File to the digest of its source, and what that imports."""


def give(folder: str, wanted: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """The notebook's own modules that are imported here, or are about to be there: name to file and source. Blocks.

    Args:
        folder: Where the notebook is now.
        wanted: Dotted names that a cell imports; those of other folders, and such as are no modules, are left out.
    """
    found: dict[str, tuple[str, str]] = {}
    left = ALL_MAX_BYTES
    folders = _folders(folder)
    for name in _own_of(folders):
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
        file = _file_of(name, folders)
        source = _read(file, left) if file else None
        if source is not None:
            left -= len(source)
            found[name] = (file, source)
            queue += [part for one in _imported_by(name, file, source) for part in _with_parents(one)]
    return dict(sorted(found.items()))


def _folders(folder: str) -> tuple[str, ...]:
    """Where own modules are: where the notebook is and was, and what of `sys.path` belongs to no environment."""
    _were[os.path.realpath(folder)] = None
    return _and_entries(tuple(_were), tuple(sys.path), folder)


@functools.lru_cache(maxsize=16)
def _and_entries(were: tuple[str, ...], entries: tuple[str, ...], folder: str) -> tuple[str, ...]:
    """These and those of the entries that belong to no environment; each cell asks."""
    reals = (os.path.realpath(entry or folder) for entry in entries)
    return tuple(dict.fromkeys((*were, *(real for real in reals if not _is_installed(real)))))


def _is_installed(real: str) -> bool:
    """Whether this folder is an environment's, which ranks have too."""
    parts = real.split(os.sep)
    prefixes = [os.path.realpath(prefix) + os.sep for prefix in (sys.prefix, sys.base_prefix)]
    known = "site-packages" in parts or "dist-packages" in parts or real in _linked()
    known = known or bool(glob.glob(os.path.join(glob.escape(real), "*.dist-info")))  # As of `pip install --target`.
    return known or any((real + os.sep).startswith(prefix) for prefix in prefixes)


@functools.cache
def _linked() -> frozenset[str]:
    """Folders that environments name in files of their own, as packages that were installed to be edited are."""
    found: set[str] = set()
    for folder in [*site.getsitepackages(), site.getusersitepackages()]:
        for file in glob.glob(os.path.join(glob.escape(folder), "*.pth")):
            lines = (_read(file, SOURCE_MAX_BYTES) or "").splitlines()
            found.update(os.path.realpath(os.path.join(folder, line)) for line in lines if line.strip())
    return frozenset(found)


def _own_of(folders: tuple[str, ...]) -> list[str]:
    """The names of modules that are of these; only those are looked at that were not there before."""
    seen, own = _looked.get(folders, ({}, []))
    now: dict[str, object] = dict(sys.modules)
    if now != seen:  # By identity first, so this takes microseconds.
        own = [name for name in own if now.get(name) is seen[name]]
        own += [name for name, module in now.items() if seen.get(name) is not module and _is_of(name, module, folders)]
        _looked.clear()  # A notebook may go to any number of folders.
        _looked[folders] = now, own
    return own


def _is_of(name: str, module: object, folders: Iterable[str]) -> bool:
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or name in ("__main__", "__mp_main__"):
        return False
    real = os.path.realpath(file)
    return any(_is_own(real, folder) for folder in folders)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _file_of(name: str, folders: Iterable[str]) -> str:
    """Where its source is, if that is in one of them; found without importing anything. Empty: it is not there."""
    inside = tuple(folders)
    for entry in dict.fromkeys((*inside, *sys.path)):
        base = os.path.realpath(entry or inside[0])
        if not any(base == folder or base.startswith(folder + os.sep) for folder in inside):
            continue
        path = os.path.join(base, *name.split("."))
        for file in (os.path.join(path, "__init__.py"), f"{path}.py"):
            if os.path.isfile(file) and any(_is_own(file, folder) for folder in inside):
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
    """Whether this is a source of the folder's, and of no environment in it; both without links, for all are asked."""
    inside = folder + os.sep
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
    loaded = {name: given[name] for name in given if name in sys.modules}
    old = with_users({name for name in loaded if _taken.get(name) != marks[name]}, loaded)
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


def with_users(changed: Iterable[str], given: Mapping[str, Any]) -> list[str]:
    """Modules that have changed and those that import them, each behind what it imports itself.

    Args:
        changed: Names of some of them.
        given: All that are looked at: name to file and source.
    """
    uses = {name: _imported_by(name, *given[name]) for name in given}
    old: set[str] = set()
    more = set(changed)
    while more:
        old |= more
        more = {name for name in given if name not in old and not old.isdisjoint(uses[name])}
    ordered: list[str] = []
    seen: set[str] = set()

    def add(name: str) -> None:
        if name in old and name not in seen:
            seen.add(name)
            for one in sorted(uses[name]):
                add(one)
            ordered.append(name)

    for name in sorted(old):
        add(name)
    return ordered


def _execute(name: str, names: dict[str, Any]) -> None:
    file, source = _sources[name]
    exec(compile(source, file, "exec"), names)  # noqa: S102 - by design: the notebook's own code.


class _Finder:
    """The last in the list, and its own loader."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _sources:
            if not any(known.startswith(f"{name}.") for known in _sources):
                return None
            above = ModuleSpec(name, None, is_package=True)  # A package without a file of its own.
            above.submodule_search_locations = []
            return above
        file, _ = _sources[name]
        package = os.path.basename(file) == "__init__.py"
        spec = ModuleSpec(name, self, origin=file, is_package=package)  # type: ignore[arg-type]
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind."""

    def exec_module(self, module: Any) -> None:
        _execute(module.__name__, vars(module))


class WithParts:
    """A module and those below it that a cell uses: who imports `a.b` has it as `a`, which alone may have no `b`."""

    def __init__(self, module: types.ModuleType, parts: Iterable[str]) -> None:
        self._names = (module.__name__, *sorted(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return imported, self._names


def imported(name: str, *parts: str) -> types.ModuleType:
    """The module of that name, and those below it imported as well."""
    for part in parts:
        importlib.import_module(part)
    return importlib.import_module(name)


def with_parts(name: str, value: object, dotted: Iterable[str]) -> object:
    """What to send for a variable: a module with its parts that are imported here, of those that a cell reads.

    Args:
        name: Of the variable.
        value: Its value, which is sent as it is if it is no module.
        dotted: What the cell reads, as it names it.
    """
    if not isinstance(value, types.ModuleType):
        return value
    used = {value.__name__ + one[len(name) :] for one in dotted if one.startswith(f"{name}.")}
    parts = [part for part in used if isinstance(sys.modules.get(part), types.ModuleType)]
    return WithParts(value, parts) if parts else value
