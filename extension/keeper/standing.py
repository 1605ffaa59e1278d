"""What is done for as long as the keeper lives, whatever happens to it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

PAUSE_S = 10.0
"""Between an accident and the next attempt: one that comes again at once must take neither processor nor log."""


async def begin_again(work: Callable[[], Awaitable[None]]) -> None:
    """Do what ends by itself only when it is over; after an accident, which is logged, from its beginning."""
    while True:
        try:
            await work()
            return
        except Exception:
            log.exception("a part of the keeper broke; it begins again in %.0f s", PAUSE_S)
        await asyncio.sleep(PAUSE_S)
