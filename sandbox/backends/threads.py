"""Work that is not left half done by who is cancelled."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


async def in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call it in a thread. Unlike with `asyncio.to_thread`, who cancels waits until it has ended.

    So nothing is made any more once a clean-up has begun; what it made it has to note down itself.
    """
    return await to_its_end(asyncio.to_thread(function, *args, **kwargs))


async def to_its_end(what: Coroutine[Any, Any, R]) -> R:
    """Await it. Who is cancelled meanwhile is so once it has ended: for clean-ups, which have to be whole."""
    work = asyncio.create_task(what)
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not work.cancelled():
            work.exception()  # Taken note of, so that nobody complains about it.
        raise asyncio.CancelledError
    return work.result()
