"""Streams say that they are there, at the pace at which their client wants to hear it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from warmcell.extension.server.e2b.calls import paced
from warmcell.extension.server.e2b.files import metadata


async def test_silence_is_broken_at_the_clients_pace_and_not_at_the_keepers() -> None:
    """An empty line after so many seconds; the keeper's own are passed over, its words are not delayed."""
    go_on = asyncio.Event()

    async def lines() -> AsyncIterator[dict[str, Any]]:
        yield {"n": 0}
        for _ in range(3):
            yield {}
        yield {"n": 1}
        await go_on.wait()
        yield {"n": 2}

    heard = []
    async for line in paced(lines(), 0.01):
        heard.append(line)
        if heard.count({}) == 3:
            go_on.set()
    assert [line for line in heard if line] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert heard[:2] == [{"n": 0}, {"n": 1}]
    assert heard[2:5] == [{}, {}, {}]


async def test_whoever_listens_no_more_leaves_nothing_behind() -> None:
    """What was waited for is given up."""
    ended = asyncio.Event()

    async def lines() -> AsyncIterator[dict[str, Any]]:
        try:
            yield {"n": 0}
            await asyncio.Event().wait()
        finally:
            ended.set()

    source = lines()
    told = paced(source, 60)
    assert await anext(told) == {"n": 0}
    waiting = asyncio.ensure_future(anext(told))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.wait_for(ended.wait(), 60)


def test_metadata_is_what_the_headers_say_first() -> None:
    """Keys in lower case, the first of several; other headers are none."""
    headers = [("X-Metadata-A", "1"), ("x-metadata-a", "2"), ("X-Metadata-", "3"), ("Content-Type", "4")]
    assert metadata(headers) == {"a": "1"}
