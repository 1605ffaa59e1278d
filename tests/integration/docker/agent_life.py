"""An ordinary user's kernel in a container that an agent saves, while that, the engine and the keeper die."""

import asyncio
import os
import select
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.integration.helper.keeping import client_of, run, start
from warmcell.sandbox.backends.docker.engine import Container, Engine
from warmcell.sandbox.backends.docker.labels import SANDBOX
from warmcell.sandbox.client.keeper import KeeperClient

GO_ON = "x += 1; print(x)"
WAIT_S = 60.0


async def lives(told: Mapping[str, Any], say: Callable[[object], None]) -> None:
    """Do all of it, and say what came of each step."""
    engine, folder = Engine(told["host"]), told["workspace"]
    async with await KeeperClient.connect() as keeper:
        pid = (await keeper.get("/status"))["pid"]
        try:
            await _live(keeper, engine, told, say)
        finally:
            agent = await _agent(engine)
            process = os.pidfd_open(agent.pid)
            os.kill(pid, signal.SIGKILL)
        say(bool(await asyncio.to_thread(lambda: select.select([process], [], [], WAIT_S)[0])))
        os.close(process)
    async with await KeeperClient.connect() as keeper:
        say([one.name for one in await asyncio.to_thread(engine.labelled, SANDBOX)])
        started, _ = await start(keeper, folder, told["spec"])
        await keeper.delete(f"/kernels/{started['kernel_id']}")
        os.kill((await keeper.get("/status"))["pid"], signal.SIGTERM)


async def _live(keeper: KeeperClient, engine: Engine, told: Mapping[str, Any], say: Callable[[object], None]) -> None:
    started, connection = await start(keeper, told["workspace"], told["spec"])
    suspend = f"/sandboxes/{started['id']}/suspend"
    table = (await keeper.get("/doctor", timeout=120))["table"]
    say([[row["backend"], row["snapshot_by"]] for row in table if row["snapshot"]])
    async with client_of(connection) as client:
        await run(client, "x = 40")
        agent = await _agent(engine)
        await asyncio.to_thread(engine.remove, agent.id)
        say((await keeper.post(suspend, {}, timeout=120))["state"])
        say(await run(client, GO_ON))
        say((await _agent(engine)).id != agent.id)
        say("kill the engine")
        await _until(told["workspace"], "killed")
        say((await keeper.post(suspend, {}, timeout=120))["state"])
        await _until(told["workspace"], "back")
        say(await run(client, GO_ON))


async def _agent(engine: Engine) -> Container:
    """The one that there is."""
    (found,) = [one for one in await asyncio.to_thread(engine.labelled, SANDBOX) if "-agent-" in one.name]
    looked = await asyncio.to_thread(engine.look, found.id)
    assert looked is not None
    return looked


async def _until(folder: str, name: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while not Path(folder, name).exists():  # noqa: ASYNC110  # Another user makes it.
            await asyncio.sleep(0.02)
