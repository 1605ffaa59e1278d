"""The modules of a kernel, imported before the fork so that a kernel imports next to nothing."""

from __future__ import annotations

import importlib
import sys

NEEDED = ("ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell")
LATER = (
    # What a kernel imports while it comes up or with its first requests.
    "IPython.core.completerlib",
    "IPython.core.debugger",
    "IPython.core.debugger_backport",
    "IPython.core.oinspect",
    "IPython.core.pylabtools",
    "IPython.extensions.storemagic",
    "IPython.lib.latextools",
    "IPython.utils.wildcard",
    "comm",
    "debugpy",
    "faulthandler",
    "ipykernel.comm",
    "ipykernel.debugger",
    "ipykernel.subshell_manager",
    "jedi",
    "pdb",
    "prompt_toolkit.formatted_text",
    "psutil",  # For the children of a kernel that is told to go. Imported then it takes longer than all else.
    "tornado.platform.asyncio",
    "zmq.eventloop.zmqstream",
)


files: list[str] = []
"""Files of the modules that were loaded when `load` had done its work: the kernel's own. Empty in a cold start."""

names: set[str] = set()
"""Their names."""


def load() -> None:
    """Import them.

    Raises:
        ImportError: The environment has no ipykernel.
    """
    for name in NEEDED:
        importlib.import_module(name)
    for name in LATER:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # Other versions have other modules.
    files.extend(filter(None, (getattr(module, "__file__", None) for module in list(sys.modules.values()))))
    names.update(sys.modules)
