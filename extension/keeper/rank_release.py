"""Gives back what notebooks keep for their next `%%remote`, once nothing has run there for long enough."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

LOOK_S = 5.0


async def release_ranks(
    service: SandboxService,
    *,
    idle_s: Callable[[SandboxId], float],
    stop: Callable[[SandboxId], Awaitable[object]],
    after_s: float,
) -> None:
    """Remove sandboxes of notebooks' remote cells, and so give their GPUs back, for ever.

    Args:
        service: Whose.
        idle_s: How long nothing has run in one.
        stop: Removes one.
        after_s: Seconds in which nothing has run there; 0: none is removed.
    """
    while after_s > 0:
        await asyncio.sleep(min(LOOK_S, after_s / 4))
        for info in service.infos():
            if info.owner != "remote" or info.state is not State.RUNNING or idle_s(info.id) < after_s:
                continue
            log.info("sandbox %s: no remote cell has run in it for %.0f s", info.id, after_s)
            try:
                await stop(info.id)
            except WarmcellError as error:
                log.warning("idle sandbox %s was not removed: %s", info.id, error)
