"""Room for what comes back, where two ranks of one sandbox want it at the same time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from warmcell.extension.keeper import runs
from warmcell.sandbox.service import SandboxService


def message(kind: str, **content: str) -> dict[str, Any]:
    return {"msg_type": kind, "content": content, "metadata": {}}


async def test_who_finds_no_room_waits_for_another_that_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What that one has written already is in no list yet; it is what is in the way."""
    step: Any = SimpleNamespace(travels=("dump",))
    step.again = step
    box = SimpleNamespace(info=SimpleNamespace(id="s1"))
    writes, tried, may_end = asyncio.Event(), asyncio.Semaphore(0), asyncio.Event()

    async def execute(runner: Any, _: Any) -> AsyncIterator[dict[str, Any]]:
        if runner.name == "first":
            writes.set()
            await may_end.wait()
            writes.clear()
        elif writes.is_set():
            tried.release()
            yield {**message("error", ename="NoRoomError"), "step": "dump"}
            yield message("reply", status="error")
            return
        yield message("reply", status="ok")

    monkeypatch.setattr(runs, "_execute", execute)
    all_runs = runs.Runs(cast(SandboxService, None))

    async def outcome(name: str) -> str:
        runner: Any = SimpleNamespace(name=name, box=box)
        said = [one async for one in all_runs._do(runner, step, Path(name))]
        return str(said[-1]["content"]["status"])

    async with asyncio.timeout(10):
        first = asyncio.create_task(outcome("first"))
        await writes.wait()
        second = asyncio.create_task(outcome("second"))
        for _ in range(2):
            await tried.acquire()
        may_end.set()
        assert await first == "ok"
        all_runs.returned(cast(Any, "s1"), Path("first"))
        assert await second == "ok"
