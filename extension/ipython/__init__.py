"""`%load_ext warmcell`: `%%remote` in a kernel that Warmcell did not start, with the same user's keeper."""

import atexit
import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from warmcell.extension.config import Warmcell, load
from warmcell.sandbox.client.keeper import SyncKeeperClient
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.guest import magics
from warmcell.sandbox.guest.magics import function
from warmcell.sandbox.guest.magics.api import Api, KeeperError
from warmcell.sandbox.guest.magics.function import remote
from warmcell.sandbox.guest.magics.pods import Pods

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


__all__ = ["Connection", "load_ipython_extension", "remote", "unload_ipython_extension"]


@cache
def _pods() -> Pods:
    """The ranks of a program that is no notebook; they go with it."""
    pods = Pods(Connection())
    atexit.register(pods.end)
    return pods


function.use(_pods)


def load_ipython_extension(shell: "InteractiveShell") -> None:
    """Add the magics. In a Warmcell kernel they are there already, and stay as they are."""
    if not magics.registered(shell):
        magics.register(shell, Connection())


def unload_ipython_extension(shell: "InteractiveShell") -> None:
    """Take the magics out and remove the sandboxes that they keep."""
    magics.unregister(shell)


class Connection:
    """Finds or starts the keeper when `%%remote` is first used, and stays connected so that it lives on."""

    def __init__(self) -> None:
        self._client: SyncKeeperClient | None = None

    def __call__(self) -> Api:
        """The keeper's API, for sandboxes with this kernel's environment and folder.

        Raises:
            KeeperError: There is no keeper and it cannot be started.
        """
        try:
            self._client = SyncKeeperClient.connect()
        except WarmcellError as error:
            raise KeeperError(error.message, error.hint, error.code) from error
        backend = Warmcell(config=load()).usual_backend
        spec = {
            "python": sys.executable,
            "backend": backend,  # As of notebooks: what runs there is their user's own.
            "workspace": {"path": os.getcwd()},
            "network": "host" if backend == "process" else "none",  # That one cannot take it away.
        }
        return Api(str(self._client.paths.keeper_socket), spec=spec)
