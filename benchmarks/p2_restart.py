"""P2: from a restart of a kernel until torch, numpy and pandas are imported, sandboxed beside plain."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.p1_start import STARTS, check_start, in_use
from benchmarks.rows import ENGINES, Engine, Row, Series, medians, phases
from benchmarks.server import OURS, PLAIN, Channels, JupyterServer
from tests.leaks import own_places

ROUNDS = 7
IMPORTS = "import torch, numpy, pandas"
GOALS: Mapping[Engine, float] = {"criu": 0.025, "template": 0.03}


async def measure(*, rounds: int = ROUNDS, engines: Sequence[Engine] = ENGINES, python: str = "") -> list[Row]:
    """A row for each engine. The kernels are restarted alternately; their websockets stay open all the time."""
    plain: list[float] = []
    parts: dict[Engine, list[Mapping[str, float]]] = {engine: [] for engine in engines}
    told: dict[Engine, list[Mapping[str, Any]]] = {engine: [] for engine in engines}
    async with contextlib.AsyncExitStack() as stack:
        kernels: dict[Engine | None, tuple[JupyterServer, str, Channels]] = {}
        for engine in engines:
            places = stack.enter_context(own_places())
            server = JupyterServer(places, settings=STARTS[engine], python=python)
            await stack.enter_async_context(server)
            await in_use(server, prepared=True)
            kernels[engine] = await ready(server, OURS, stack)
            await server.warm()
        kernels[None] = await ready(server, PLAIN, stack)
        for number in range(rounds):
            for which in kernels if number % 2 else reversed(kernels):
                for engine in engines:
                    await kernels[engine][0].warm()
                took = await restarted(*kernels[which])
                if which is None:
                    plain.append(sum(took.values()))
                    continue
                info = await kernels[which][0].sandbox(kernels[which][1])
                check_start(info, "template")
                parts[which].append(took)
                told[which].append(info)
    baseline = Series(what=f"{PLAIN} kernelspec", samples=plain)
    return [
        Row(
            promise="P2",
            what="restart → torch, numpy and pandas ready",
            engine=engine,
            baseline=baseline,
            ours=Series(what=f"{OURS} kernelspec", samples=[sum(took.values()) for took in parts[engine]]),
            goal=GOALS[engine],
            parts_s=medians(parts[engine]),
            phases_s=phases(told[engine]),
        )
        for engine in engines
    ]


async def ready(
    server: JupyterServer, name: str, stack: contextlib.AsyncExitStack
) -> tuple[JupyterServer, str, Channels]:
    """A kernel that has imported all, so that the libraries' files are in the page cache from here on."""
    kernel_id = await server.start_kernel(name)
    stack.push_async_callback(server.delete_kernel, kernel_id)
    channels = await stack.enter_async_context(server.channels(kernel_id))
    await channels.execute(IMPORTS)
    return server, kernel_id, channels


async def restarted(server: JupyterServer, kernel_id: str, kernel: Channels) -> dict[str, float]:
    """Restart it and import: seconds of each part."""
    began = time.perf_counter()
    await server.restart_kernel(kernel_id)
    answered = time.perf_counter()
    await kernel.execute(IMPORTS)
    return {"POST": answered - began, "imports": time.perf_counter() - answered}
