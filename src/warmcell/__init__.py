"""Instant sandboxes for Jupyter kernels, on your own machines.

Importing this package is cheap: the names below are looked up when they are first used, and neither tornado
nor torch nor a container library is loaded before something needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from warmcell.sandbox.errors import WarmcellError

_EXPORTS = {"WarmcellError": "warmcell.sandbox.errors"}
"""Public name to the module that defines it."""

__all__ = ["WarmcellError", "__version__", "load_ipython_extension", "unload_ipython_extension"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("warmcell")
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: "InteractiveShell") -> None:
    """Register `%%remote` and its friends; called by `%load_ext warmcell`."""
    import_module("warmcell.extension.ipython").load_ipython_extension(ipython)


def unload_ipython_extension(ipython: "InteractiveShell") -> None:
    """Take the magics out again; called by `%unload_ext warmcell`."""
    import_module("warmcell.extension.ipython").unload_ipython_extension(ipython)


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension", "dest": "@warmcell/labextension"}]


def _jupyter_server_extension_points() -> list[dict[str, object]]:
    app = import_module("warmcell.extension.server.app").WarmcellApp
    return [{"module": "warmcell.extension.server", "app": app}]
