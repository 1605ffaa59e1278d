"""The keeper, as commands see it: one that runs, or none."""

from typing import TYPE_CHECKING

from warmcell.sandbox.paths import Paths

if TYPE_CHECKING:
    from warmcell.sandbox.client.keeper import SyncKeeperClient


def running_keeper(*, start: bool = False) -> "SyncKeeperClient | None":
    """A connection to this user's keeper, or None where none runs.

    Args:
        start: Start one instead of answering None.

    Raises:
        TransportError: One runs but does not answer, or it could not be started.
    """
    from warmcell.sandbox.client.keeper import SyncKeeperClient
    from warmcell.sandbox.client.start import is_listening

    paths = Paths.default()
    if not start and not is_listening(paths):
        return None
    return SyncKeeperClient.connect(paths=paths, start=start)
