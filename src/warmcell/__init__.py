"""Instant sandboxes for Jupyter kernels, on your own machines.

Importing this package is cheap: the names below are looked up when they are first used, and neither tornado
nor torch nor a container library is loaded before something needs it.
"""

from importlib import import_module
from sys import modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from warmcell.sandbox.client.async_sandboxes import AsyncSandbox
    from warmcell.sandbox.client.images import build_image
    from warmcell.sandbox.client.sandboxes import Sandbox
    from warmcell.sandbox.errors import WarmcellError
    from warmcell.sandbox.guest.kernel.hooks import after_restore, before_snapshot, fork
    from warmcell.sandbox.guest.magics.function import remote
    from warmcell.sandbox.images.image import Image

_IN_KERNELS = "warmcell_guest.kernel.hooks"
_ON_RANKS = "warmcell_guest.magics.function"
"""What a kernel of ours has for its notebook. It is not part of this package's own copy of the guest's tree."""

_EXPORTS = {
    "AsyncSandbox": "warmcell.sandbox.client.async_sandboxes",
    "Image": "warmcell.sandbox.images.image",
    "Sandbox": "warmcell.sandbox.client.sandboxes",
    "WarmcellError": "warmcell.sandbox.errors",
    "after_restore": _IN_KERNELS,
    "before_snapshot": _IN_KERNELS,
    "build_image": "warmcell.sandbox.client.images",
    "fork": _IN_KERNELS,
    "remote": _ON_RANKS,
}
"""Public name to the module that defines it."""

__all__ = [
    "AsyncSandbox",
    "Image",
    "Sandbox",
    "WarmcellError",
    "__version__",
    "after_restore",
    "before_snapshot",
    "build_image",
    "fork",
    "load_ipython_extension",
    "remote",
    "unload_ipython_extension",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("warmcell")
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if module == _IN_KERNELS and "warmcell_guest" not in modules:
        # Elsewhere they can be called too, so that a notebook runs: hooks are never run, and a fork says why not.
        module = "warmcell.sandbox.guest.kernel.hooks"
    if module == _ON_RANKS and "warmcell_guest" not in modules:
        module = "warmcell.extension.ipython"
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
