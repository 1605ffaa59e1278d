"""`%%remote`, `%snapshot` and `%restore`. The first serves plain kernels too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .staying import stay

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from .api import Api


__all__ = ["register", "register_snapshots", "registered", "stay", "unregister"]


def register(shell: InteractiveShell, connect: Callable[[], Api]) -> None:
    """Add the magics to `shell`.

    Args:
        shell: Where they run.
        connect: Finds whom to ask for sandboxes; called when that is first needed.
    """
    from .remote import Remote

    remote = Remote(shell, connect)
    shell.magics_manager.register_function(remote.magic, "cell", "remote")
    shell.magics_manager.register_function(remote.line, "line", "remote")


def register_snapshots(shell: InteractiveShell, connect: Callable[[], Api]) -> None:
    """Add the magics for this very kernel's snapshots and GPU to `shell`, where that is in a sandbox."""
    from .gpu import Gpu
    from .snapshots import Snapshots

    snapshots = Snapshots(shell, connect)
    shell.magics_manager.register_function(snapshots.snapshot, "line", "snapshot")
    shell.magics_manager.register_function(snapshots.restore, "line", "restore")
    shell.magics_manager.register_function(Gpu(shell, connect).gpu, "line", "gpu")


def registered(shell: InteractiveShell) -> bool:
    """Whether `%%remote` is there."""
    return "remote" in shell.magics_manager.magics["cell"]


def unregister(shell: InteractiveShell) -> None:
    """Take the magics out again and let go of their sandboxes."""
    magic = shell.magics_manager.magics["cell"].pop("remote", None)
    shell.magics_manager.magics["line"].pop("remote", None)
    owner = getattr(magic, "__self__", None)
    if owner is not None:
        owner.close()
