"""P2: from a restart of a kernel until torch, numpy and pandas are imported, sandboxed beside plain."""

import contextlib
import time
from collections.abc import Mapping

from benchmarks.p1_start import OURS, PLAIN
from benchmarks.rows import Row, Series, medians
from benchmarks.server import BenchmarkError, Channels, JupyterServer
from tests.leaks import own_places

ROUNDS = 15
IMPORTS = "import torch, numpy, pandas"


async def measure(*, rounds: int = ROUNDS) -> list[Row]:
    """Restart two kernels alternately; their websockets stay open all the time."""
    found: dict[str, list[Mapping[str, float]]] = {PLAIN: [], OURS: []}
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places())))
        kernels: dict[str, tuple[str, Channels]] = {}
        for name in (PLAIN, OURS):
            kernel_id = await server.start_kernel(name)
            stack.push_async_callback(server.delete_kernel, kernel_id)
            channels = await stack.enter_async_context(server.channels(kernel_id))
            await channels.execute(IMPORTS)  # The libraries' files are in the page cache from here on.
            kernels[name] = kernel_id, channels
        await server.warm()
        for number in range(rounds):
            for name in (PLAIN, OURS) if number % 2 else (OURS, PLAIN):
                found[name].append(await restarted(server, *kernels[name]))
            told = (await server.sandbox(kernels[OURS][0]))["started_from"]
            if told != "template":
                raise BenchmarkError(f"a restart was to be measured from the template, and was from {told}")
    plain, ours = (
        Series(what=f"{name} kernelspec", samples_s=[sum(parts.values()) for parts in found[name]])
        for name in (PLAIN, OURS)
    )
    return [
        Row(
            promise="P2",
            what="restart → torch, numpy and pandas ready",
            baseline=plain,
            ours=ours,
            limit=0.1,
            goal=0.03,
            parts_s=medians(found[OURS]),
        )
    ]


async def restarted(server: JupyterServer, kernel_id: str, kernel: Channels) -> dict[str, float]:
    """Restart it and import: seconds of each part."""
    began = time.perf_counter()
    await server.restart_kernel(kernel_id)
    answered = time.perf_counter()
    await kernel.execute(IMPORTS)
    return {"POST": answered - began, "imports": time.perf_counter() - answered}
