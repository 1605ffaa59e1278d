"""P4: from an `execute_request` to a suspended kernel with 1 GB of state until its reply; its websocket stays open.

The baseline is what a restore that copies memory cannot do without: the snapshot's pages, read from the page cache into
fresh memory.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.keeper import Keeper
from benchmarks.rows import Row, Series, medians, phases
from benchmarks.server import OURS, BenchmarkError, Channels, JupyterServer
from tests.leaks import own_places

ROUNDS = 6
COLD_ROUNDS = 2
STATE_BYTES = 10**9

FILL = """
import numpy
state = numpy.random.default_rng(4).integers(0, 256, {size}, dtype='uint8')
total = int(state.sum())
"""
CHECK = "assert int(state.sum()) == total"


async def measure(*, rounds: int = ROUNDS, cold_rounds: int = COLD_ROUNDS, python: str = "") -> list[Row]:
    """One row. The state is compared at the end, when it has come through all rounds."""
    read: list[float] = []
    found: dict[str, list[Mapping[str, float]]] = {"warm": [], "cold": []}
    told: list[Mapping[str, Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places()), python=python))
        kernel_id = await server.start_kernel(OURS)
        stack.push_async_callback(server.delete_kernel, kernel_id)
        keeper = await stack.enter_async_context(Keeper(server.places))
        kernel = await stack.enter_async_context(server.channels(kernel_id))
        await kernel.run(FILL.format(size=STATE_BYTES))
        sandbox_id = (await keeper.sandbox(kernel_id))["id"]
        sizes = [await suspended(keeper, sandbox_id)]
        await resumed(keeper, kernel, kernel_id)  # The first time some files are read that are read each time.
        for _ in range(rounds):
            sizes.append(await suspended(keeper, sandbox_id))
            read.append(await copied(keeper, (await keeper.sandbox(kernel_id))["snapshot"], STATE_BYTES))
            parts, info = await resumed(keeper, kernel, kernel_id)
            found["warm"].append(parts)
            told.append(info)
        for _ in range(min(rounds, cold_rounds)):
            await suspended(keeper, sandbox_id)
            if not keeper.forget((await keeper.sandbox(kernel_id))["snapshot"]):
                break
            found["cold"].append((await resumed(keeper, kernel, kernel_id))[0])
        await kernel.execute(CHECK)
    return [
        Row(
            promise="P4",
            what="resume of a kernel with 1 GB of state → first reply",
            engine="criu",
            baseline=Series(what="its pages read from the page cache into fresh memory", samples=read),
            ours=Series(what="execute → reply", samples=[parts["execute"] for parts in found["warm"]]),
            cold=Series.of("the snapshot not in the page cache", [took["execute"] for took in found["cold"]]),
            goal=0.12,
            parts_s=medians(found["warm"]),
            phases_s=phases(told),
            sizes_bytes={**{f"first {name}": size for name, size in sizes[0].items()}, **medians(sizes[1:])},
        )
    ]


async def copied(keeper: Keeper, snapshot: str, state_bytes: int) -> float:
    """Seconds of reading a snapshot's pages into fresh memory, or as many others where these may not be read.

    Raises:
        BenchmarkError: The snapshot has fewer pages than the state.
    """
    image = keeper.image(snapshot)
    if image is None:
        with tempfile.NamedTemporaryFile(dir=keeper.paths.state) as other:
            other.write(os.urandom(state_bytes))
            other.flush()
            await pages.read_s([Path(other.name)])
            return await pages.read_s([Path(other.name)])
    files = pages.page_files(image)
    if pages.held_bytes(files) < state_bytes:
        raise BenchmarkError(f"the snapshot's page files hold {pages.held_bytes(files)} bytes only")
    await pages.read_s(files)
    return await pages.read_s(files)


async def suspended(keeper: Keeper, sandbox_id: str) -> dict[str, float]:
    """Suspend it and wait until its snapshot is complete; how large that is."""
    info = await keeper.do("suspend", sandbox_id)
    await keeper.settled()
    return await keeper.sizes(info["snapshot"])


async def resumed(keeper: Keeper, kernel: Channels, kernel_id: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Wake it with a cell: seconds of each part, and what is told of the sandbox.

    Raises:
        BenchmarkError: It was not suspended.
    """
    before = await keeper.sandbox(kernel_id)
    if before["state"] != "suspended":
        raise BenchmarkError(f"the kernel was to be suspended, and was {before['state']}")
    began = time.perf_counter()
    await kernel.execute("1")
    replied = time.perf_counter()
    await kernel.run("1")  # It is idle, so it may be suspended again.
    info = await keeper.sandbox(kernel_id)
    return {"execute": replied - began, "in the keeper": info["resumed_ms"] / 1000}, info
