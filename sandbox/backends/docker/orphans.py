"""Containers whose keeper is gone: unlike other sandboxes they outlive it."""

import contextlib
import logging

from warmcell.sandbox.backends.docker import empty
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.docker.labels import SANDBOX, is_orphan
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.paths import Paths

log = logging.getLogger(__name__)

NAME = "engines"
"""File in the state directory: addresses of the engines that keepers of this user have used, a line each."""


def remember(paths: Paths, address: str) -> None:
    """Take note that containers may be there. Blocks."""
    if address not in _remembered(paths):
        with (paths.state / NAME).open("a") as file:
            file.write(f"{address}\n")


def remove_orphans(paths: Paths) -> list[str]:
    """Remove what killed keepers have left in any engine that was used. Blocks; an engine that is away is left out.

    Returns:
        What was removed, a line each.
    """
    removed: list[str] = []
    for address in _remembered(paths):
        engine = Engine(address)
        with contextlib.suppress(WarmcellError):
            for container in engine.labelled(SANDBOX):
                if not is_orphan(container.labels):
                    continue
                try:
                    engine.remove(container.id)
                except WarmcellError as error:  # The others go all the same.
                    log.warning("the container %s cannot be removed: %s", container.name, error)
                else:
                    removed.append(f"container {container.name}")
    return removed


def remove_images(paths: Paths) -> list[str]:
    """Remove the image of agent containers from any engine that was used, where none is of it. Blocks; as above.

    Returns:
        What was removed, a line each.
    """
    removed: list[str] = []
    for address in _remembered(paths):
        with contextlib.suppress(WarmcellError):
            if empty.remove(Engine(address)):
                removed.append(f"image {empty.CALLED}")
    return removed


def _remembered(paths: Paths) -> list[str]:
    try:
        return (paths.state / NAME).read_text().split()
    except OSError:
        return []
