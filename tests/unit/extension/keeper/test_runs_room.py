"""Room for what comes back, where two ranks of one sandbox want it at the same time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from warmcell.extension.keeper.returning import Returning


def message(kind: str, **content: str) -> dict[str, Any]:
    return {"msg_type": kind, "content": content, "metadata": {}}


async def test_who_finds_no_room_waits_for_another_that_has_not_ended() -> None:
    """What that one has written already is in no list yet; it is what is in the way."""
    returning = Returning()
    writes, tried, may_end = asyncio.Event(), asyncio.Semaphore(0), asyncio.Event()

    async def outcome(name: str) -> str:
        async def execute(_: Any) -> AsyncIterator[dict[str, Any]]:
            if name == "first":
                writes.set()
                await may_end.wait()
                writes.clear()
            elif writes.is_set():
                tried.release()
                yield {**message("error", ename="NoRoomError"), "step": "dump"}
                yield message("reply", status="error")
                return
            yield message("reply", status="ok")

        step: Any = SimpleNamespace(again=None)
        run: Any = execute
        said = [one async for one in returning.run(run, step, Path(name))]
        return str(said[-1]["content"]["status"])

    async with asyncio.timeout(10):
        first = asyncio.create_task(outcome("first"))
        await writes.wait()
        second = asyncio.create_task(outcome("second"))
        for _ in range(2):
            await tried.acquire()
        may_end.set()
        assert await first == "ok"
        returning.gone(Path("first"))
        assert await second == "ok"
