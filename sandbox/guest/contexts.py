"""Several sets of variables in one kernel: each context has a `__main__` of its own, and a directory.

They share the process, so imports are made once, and a snapshot or a fork has them all. In a kernel this module is
`warmcell_guest.contexts`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT = "default"

_namespaces: dict[str, ModuleType] = {}
_directories: dict[str, str] = {}
_current = DEFAULT


def use(name: str, cwd: str = "") -> None:
    """Run what comes next in this context, which is made where it is not there yet.

    Args:
        name: Its id.
        cwd: Where a new one begins; empty: where the kernel is.
    """
    global _current
    if name == _current and name in _directories:
        return
    shell = _shell()
    _namespaces.setdefault(_current, shell.user_module)
    _directories[_current] = os.getcwd()
    if name not in _namespaces:
        _namespaces[name] = ModuleType("__main__")
        _directories[name] = cwd or os.getcwd()
        _enter(shell, name, new=True)
    else:
        _enter(shell, name, new=False)


def drop(name: str) -> None:
    """Forget its variables. The default one begins anew."""
    shell = _shell()
    if name == DEFAULT:
        use(DEFAULT)
        shell.reset(new_session=False)
        return
    if name == _current:
        use(DEFAULT)
    _namespaces.pop(name, None)
    _directories.pop(name, None)


def _enter(shell: Any, name: str, *, new: bool) -> None:
    global _current
    module = _namespaces[name]
    shell.user_module = module
    shell.user_ns = module.__dict__
    sys.modules["__main__"] = module
    if new:
        shell.user_module.__dict__.setdefault("__builtins__", __builtins__)
        shell.init_user_ns()
    _current = name
    with contextlib.suppress(OSError):  # It was removed; the context stays where the last one was.
        os.chdir(_directories[name])


def _shell() -> Any:
    from IPython import get_ipython

    return get_ipython()
