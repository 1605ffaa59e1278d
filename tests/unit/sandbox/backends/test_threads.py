"""Removals that are not given up halfway."""

import asyncio

import pytest

from warmcell.sandbox.backends.threads import to_its_end


async def test_what_is_done_to_its_end_is_done_though_who_waits_is_cancelled() -> None:
    """And whoever waits is cancelled only when it is done."""
    began, go_on = asyncio.Event(), asyncio.Event()
    done: list[bool] = []

    async def work() -> None:
        began.set()
        await go_on.wait()
        done.append(True)

    waiting = asyncio.create_task(to_its_end(work()))
    await began.wait()
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=0.01)
    assert not waiting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done == [True]
