"""`import warmcell` in a kernel whose environment has no such package: what a notebook needs of it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "warmcell"
OFFERED = ("after_restore", "before_snapshot", "fork")
REMOTE = "remote"


def offer() -> None:
    """Let the name be found where nobody else finds it; a package that is installed later wins."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder:
    """The last in the list, and its own loader."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, origin="the sandbox") if name == NAME else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """The usual kind."""

    def exec_module(self, module: ModuleType) -> None:
        from ..magics.function import remote
        from . import hooks

        module.__doc__ = hooks.__doc__
        vars(module).update({name: getattr(hooks, name) for name in OFFERED})
        vars(module).update({REMOTE: remote, "__all__": [*OFFERED, REMOTE]})
