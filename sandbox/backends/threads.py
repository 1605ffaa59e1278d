"""Work in threads, which is not left half done by who is cancelled."""

import asyncio
import contextvars
import functools
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


async def in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call it in a thread. Unlike with `asyncio.to_thread`, who cancels waits until it has ended.

    So nothing is made any more once a clean-up has begun; what it made it has to note down itself.
    """
    return await to_its_end(asyncio.to_thread(function, *args, **kwargs))


class Threads:
    """Threads for one kind of work that may wait for others for long.

    Those of the event loop are few, and are for what takes milliseconds: all kinds of sandboxes share them.
    """

    def __init__(self, name: str, *, most: int) -> None:
        """Nothing is started yet.

        Args:
            name: What its threads are called.
            most: How many may be at work at once; what comes then waits.
        """
        self._name, self._most = name, most
        self._pool: ThreadPoolExecutor | None = None

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it in one of them. As with `in_thread`, who cancels waits until it has ended."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._most, thread_name_prefix=self._name)
        call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
        return await to_its_end(_awaited(asyncio.get_running_loop().run_in_executor(self._pool, call)))


ENGINE = Threads("engine", most=64)
"""Who asks an engine of containers: it may be stopped, and each call waits for up to a minute."""

BUILDS = Threads("build", most=64)
"""A build is one call, which may last for hours."""


async def _awaited(work: "asyncio.Future[R]") -> R:
    return await work


async def to_its_end(what: Coroutine[Any, Any, R]) -> R:
    """Await it. Who is cancelled meanwhile is so once it has ended: for clean-ups, which have to be whole."""
    work, given_up = await ended(what)
    if given_up:
        raise asyncio.CancelledError
    return work.result()


async def ended(what: Coroutine[Any, Any, R]) -> tuple["asyncio.Task[R]", bool]:
    """Await its end, whatever that is. Never raises.

    Returns:
        What has ended, and whether the caller was cancelled meanwhile, which it is to raise once all is noted.
    """
    work = asyncio.create_task(what)
    given_up = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            given_up = True
    if not work.cancelled():
        work.exception()  # Taken note of, so that nobody complains about it.
    return work, given_up
