"""Sandboxes are there for commands before their kernels are."""

import asyncio
import time
from typing import Any

from warmcell import AsyncSandbox
from warmcell.sandbox.client.keeper import KeeperClient

WANTED: dict[str, Any] = {"spec": {"preload": []}, "terms": {}}


async def test_nobody_waits_for_a_kernel_that_nobody_has_asked_for(at_home: None) -> None:
    """A new sandbox has none yet; it comes up by itself, unless it was asked for at once."""
    async with await KeeperClient.connect() as keeper:
        made = await keeper.post("/sandboxes", WANTED)
        asked = await keeper.post("/sandboxes", {**WANTED, "kernel": True})
        assert [(one["state"], one["generation"]) for one in (made, asked)] == [("running", 0), ("running", 1)]
        box = await AsyncSandbox.connect(made["id"])
        assert (await box.exec("echo", "up")).stdout == "up\n"
        deadline = time.monotonic() + 60
        while (info := await box.info()).started_from is None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        assert (info.generation, info.phase) == (1, None)
        await box.close()
        await asyncio.gather(*(keeper.delete(f"/sandboxes/{one['id']}") for one in (made, asked)))


async def test_all_that_want_the_first_kernel_at_once_have_the_same(at_home: None) -> None:
    """Runs and a fork of a sandbox that has none yet start one, and all of them end well."""
    async with AsyncSandbox(preload=()) as box:
        which = "import os; os.getpid()"
        first, second, clones = await asyncio.gather(box.run(which), box.run(which), box.fork(1))
        assert (first.error, first.text) == (None, second.text)
        assert (await box.info()).generation == 1
        async with clones[0] as clone:  # It is the one that there is, and goes with the block.
            assert (clone, (await clone.run("1 + 1")).text) == (clones[0], "2")
        assert [one.id for one in await AsyncSandbox.list() if one.id == clone.id] == []
