"""P11: the second snapshot of a kernel with 1 GB of state, after a small change, beside its first.

In between the kernel is suspended and resumed, as it is in a notebook's life; it then maps its memory from that
snapshot, and the next one holds what has changed. Both are `POST /sandboxes/{id}/snapshot`, the kernel going on.
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.keeper import Keeper
from benchmarks.p4_resume import CHECK, FILL, STATE_BYTES, resumed, suspended
from benchmarks.rows import Row, Series, medians
from benchmarks.server import OURS, JupyterServer
from tests.leaks import own_places

ROUNDS = 3
"""And no more, for each takes long."""
COLD_ROUNDS = 1
CHANGED_BYTES = 10**6
CHANGE = """
total -= int(state[:{size}].sum())
state[:{size}] += 1
total += int(state[:{size}].sum())
"""


async def measure(
    *, rounds: int = ROUNDS, cold_rounds: int = COLD_ROUNDS, state_bytes: int = STATE_BYTES, python: str = ""
) -> list[Row]:
    """One row. Each round has a kernel of its own, for a first snapshot can be made only once."""
    first: list[float] = []
    second: list[float] = []
    cold: list[float] = []
    sizes: list[Mapping[str, float]] = []
    engine: list[Mapping[str, float]] = []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places()), python=python))
        stays = await server.start_kernel(OURS)  # The keeper does not go between two rounds.
        stack.push_async_callback(server.delete_kernel, stays)
        keeper = await stack.enter_async_context(Keeper(server.places))
        await server.warm()
        for number in range(rounds + cold_rounds):
            kernel_id = await server.start_kernel(OURS)
            try:
                async with server.channels(kernel_id) as kernel:
                    await kernel.run(FILL.format(size=state_bytes))
                    sandbox_id = (await keeper.sandbox(kernel_id))["id"]
                    took_first, one = await saved(keeper, sandbox_id, "first")
                    await suspended(keeper, sandbox_id)
                    if number >= rounds and not keeper.forget((await keeper.sandbox(kernel_id))["snapshot"]):
                        break
                    await resumed(keeper, kernel, kernel_id)
                    await kernel.run(CHANGE.format(size=CHANGED_BYTES))
                    took, two = await saved(keeper, sandbox_id, "second")
                    await kernel.execute(CHECK)
                if number >= rounds:
                    cold.append(took)
                    continue
                first.append(took_first)
                second.append(took)
                sizes.append({"first image": one["image_bytes"], "second image": two["image_bytes"]})
                engine.append(two["phases_ms"])
            finally:
                await server.delete_kernel(kernel_id)
    return [
        Row(
            promise="P11",
            what="second snapshot of a 1 GB kernel after a small change",
            engine="criu",
            baseline=Series(what="its first snapshot", samples=first),
            ours=Series(what="its second snapshot", samples=second),
            cold=Series.of("the snapshot that it was resumed from not in the page cache", cold),
            goal=0.2,
            phases_s={name: took / 1000 for name, took in medians(engine).items()},
            sizes_bytes=medians(sizes),
        )
    ]


async def saved(keeper: Keeper, sandbox_id: str, name: str) -> tuple[float, dict[str, Any]]:
    """Seconds of a snapshot, and what is told of it once nothing is done to it any more."""
    began = time.perf_counter()
    info = await keeper.do("snapshot", sandbox_id, name=name)
    took = time.perf_counter() - began
    await keeper.settled()
    return took, info
