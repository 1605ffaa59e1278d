"""Gives back the GPUs of what notebooks keep for their next `%%remote`, while nothing runs there.

The next cell has them again, and finds its variables. These kernels have no proxy: the keeper is their only client, and
notices by itself.
"""

import asyncio
import logging
from collections.abc import Mapping

from warmcell.extension.keeper.runs import Runs
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

LOOK_S = 5.0
TRY_AGAIN_S = 60.0
"""One that could not be parked is left alone for so long."""


async def park_ranks(service: SandboxService, runs: Runs, *, after_s: float, asked_after_s: float) -> None:
    """Park sandboxes of notebooks' remote cells, for ever.

    Args:
        service: Whose.
        runs: What runs in them.
        after_s: Seconds in which nothing has run there; 0: none is parked at all.
        asked_after_s: The same if somebody waits for its GPUs; 0: never for that reason.
    """
    soonest = min(after_s, asked_after_s or after_s)
    alone: Mapping[SandboxId, float] = {}
    while after_s > 0:
        await asyncio.sleep(min(LOOK_S, soonest / 4))
        now = asyncio.get_running_loop().time()
        alone = {name: until for name, until in alone.items() if until > now}
        idle = {
            info.id: runs.idle_s(info.id)
            for info in service.infos()
            if info.owner == "remote" and info.gpus and info.state is State.RUNNING and info.id not in alone
        }
        try:
            due = await _due(service, idle, after_s, asked_after_s)
        except errors.WarmcellError as error:  # Whoever waits is told so as well.
            log.debug("who waits for a GPU is not known: %s", error)
            continue
        for sandbox_id in due:
            try:
                await runs.park(sandbox_id)
            except errors.WarmcellError as error:
                log.debug("idle sandbox %s is not parked: %s", sandbox_id, error)
                alone = {**alone, sandbox_id: now + TRY_AGAIN_S}


async def _due(
    service: SandboxService, idle: Mapping[SandboxId, float], after_s: float, asked_after_s: float
) -> list[SandboxId]:
    """Those that are to give their GPUs back, the longest idle first."""
    order = sorted(idle, key=lambda one: -idle[one])
    due = [one for one in order if idle[one] >= after_s]
    asked = [one for one in order if asked_after_s and asked_after_s <= idle[one] < after_s]
    if asked and await service.leases.queue():
        due += await service.leases.to_reclaim(asked)
    return due
