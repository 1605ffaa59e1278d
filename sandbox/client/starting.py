"""Have a keeper come up from an event loop: one attempt at a time, however many wait for it, and for how long."""

import asyncio
from weakref import WeakKeyDictionary

from warmcell.sandbox.client.start import ensure_keeper, is_listening
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths

_starts: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Paths, asyncio.Task[None]]] = WeakKeyDictionary()


async def keeper_listens(paths: Paths, *, patience_s: float | None = None) -> None:
    """Return once the keeper listens; one is started where none does.

    A keeper that is being stopped saves its kernels first, and the next one waits for it. That may take a minute, in
    which one thread waits, not one for each caller.

    Args:
        paths: Where it listens.
        patience_s: Give up after so many seconds; the keeper comes up all the same. None: wait for it.

    Raises:
        TransportError: It did not come up, or not yet.
        BackendUnavailableError: The runtime directory cannot be used.
    """
    if await asyncio.to_thread(is_listening, paths):
        return
    start = _start_of(paths)
    done, _ = await asyncio.wait({start}, timeout=patience_s)
    if not done:
        raise TransportError(
            "The keeper is not up yet: the one before is still saving its kernels",
            hint="Wait a moment and try again.",
            details={"coming": True},
        )
    start.result()


def _start_of(paths: Paths) -> asyncio.Task[None]:
    """The attempt that is under way, or a new one."""
    starts = _starts.setdefault(asyncio.get_running_loop(), {})
    start = starts.get(paths)
    if start is None:
        start = starts[paths] = asyncio.create_task(asyncio.to_thread(ensure_keeper, paths))
        start.add_done_callback(lambda done: _ended(starts, paths, done))
    return start


def _ended(starts: dict[Paths, asyncio.Task[None]], paths: Paths, done: asyncio.Task[None]) -> None:
    """The next caller tries again; nobody may have waited for this attempt's end."""
    del starts[paths]
    if not done.cancelled():
        done.exception()
