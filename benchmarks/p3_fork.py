"""P3: eight clones of a live 300 MB kernel, until each has answered, beside one plain start with the same imports.

So are the eight ranks of a cell with `%%remote fork` in a kernel of 1 GB, until the last of them is in its first line.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.keeper import Keeper
from benchmarks.p2_restart import IMPORTS
from benchmarks.rows import Row, Series, medians, phases
from benchmarks.server import OURS, PLAIN, BenchmarkError, Channels, JupyterServer
from tests.leaks import own_places

ROUNDS = 4
COLD_ROUNDS = 2
CLONES = 8
STATE_BYTES = 300 * 10**6
RANKS_STATE_BYTES = 10**9
SAVED = "size"
"""A snapshot that says how large the kernel is."""

FILL = """
import numpy
with open('/proc/self/status') as _status:
    _used = next(int(line.split()[1]) * 1024 for line in _status if line.startswith('RssAnon:'))
state = numpy.random.default_rng(3).integers(0, 256, max({size} - _used, 10**6), dtype='uint8')
total = int(state.sum())
"""
"""An array that makes the kernel's own memory as large as `size`."""

CHECK = "assert int(state.sum()) == total"


FORKED = f"""%%remote fork n={CLONES} get=began
import time
began = time.time()
assert int(state[:10**6].sum()) == first
"""


async def measure(*, rounds: int = ROUNDS, python: str = "") -> list[Row]:
    """Two rows. The clones are there for the time of a round only."""
    return [
        await clones_of_a_kernel(rounds=rounds, python=python),
        await ranks_of_a_cell(rounds=rounds, python=python),
    ]


async def ranks_of_a_cell(*, rounds: int, python: str = "") -> Row:
    """Ranks that a cell has its kernel cloned into."""
    plain: list[float] = []
    found: list[dict[str, float]] = []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places()), python=python))
        kernel_id = await server.start_kernel(OURS)
        stack.push_async_callback(server.delete_kernel, kernel_id)
        async with server.channels(kernel_id) as source:
            await source.execute(IMPORTS)
            await source.run(FILL.format(size=RANKS_STATE_BYTES) + "first = int(state[:10**6].sum())")
            await forked(source)
            await server.warm()
            for _ in range(rounds):
                plain.append(await started_with_imports(server))
                found.append(await forked(source))
            await source.execute(CHECK)
    return Row(
        promise="P3",
        what=f"{CLONES} ranks of `%%remote fork` in a {RANKS_STATE_BYTES // 10**9} GB kernel, all in their first line",
        engine="criu",
        baseline=Series(what=f"one {PLAIN} kernelspec start, with its imports", samples=plain),
        ours=Series(what="the cell until then", samples=[parts["first line"] for parts in found]),
        goal=0.3,
        parts_s=medians(found),
    )


async def forked(source: Channels) -> dict[str, float]:
    """Seconds from sending the cell until the last rank is in its first line, and until the cell is done."""
    began, at = time.perf_counter(), time.time()
    answer = await source.execute(FORKED, expressions={"began": "max(began)"})
    took = time.perf_counter() - began
    return {"first line": float(answer["user_expressions"]["began"]["data"]["text/plain"]) - at, "cell": took}


async def clones_of_a_kernel(*, rounds: int, cold_rounds: int = COLD_ROUNDS, python: str = "") -> Row:
    """Clones that are asked for from outside. What a fork writes is always in the page cache: cold are those of a
    snapshot from before.
    """
    plain: list[float] = []
    found: list[Mapping[str, float]] = []
    told: list[Mapping[str, Any]] = []
    cold: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places()), python=python))
        kernel_id = await server.start_kernel(OURS)
        stack.push_async_callback(server.delete_kernel, kernel_id)
        keeper = await stack.enter_async_context(Keeper(server.places))
        async with server.channels(kernel_id) as source:
            await source.execute(IMPORTS)
            await source.run(FILL.format(size=STATE_BYTES))
            sandbox_id = (await keeper.sandbox(kernel_id))["id"]
            saved = await keeper.do("snapshot", sandbox_id, name=SAVED)
            await clones_answer(keeper, sandbox_id, count=1)
            await server.warm()
            for _ in range(rounds):
                plain.append(await started_with_imports(server))
                parts, clones = await clones_answer(keeper, sandbox_id)
                found.append(parts)
                told += clones
            for _ in range(min(rounds, cold_rounds)):
                if not keeper.forget(saved["id"]):
                    break
                cold.append(sum((await clones_answer(keeper, sandbox_id, snapshot=SAVED))[0].values()))
            await source.execute(CHECK)
    return Row(
        promise="P3",
        what=f"{CLONES} clones of a live {STATE_BYTES // 10**6} MB kernel, all answering",
        engine="criu",
        baseline=Series(what=f"one {PLAIN} kernelspec start, with its imports", samples=plain),
        ours=Series(what=f"fork of {CLONES}", samples=[sum(parts.values()) for parts in found]),
        cold=Series.of("clones of its snapshot, which is not in the page cache", cold),
        goal=0.2,
        parts_s=medians(found),
        phases_s=phases(told),
        sizes_bytes={"image": saved["image_bytes"], "memory": saved["memory_bytes"]},
    )


async def clones_answer(
    keeper: Keeper, sandbox_id: str, *, count: int = CLONES, snapshot: str = ""
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Fork, have each clone answer, remove them: seconds of each part, and what was told of the clones.

    Args:
        keeper: Where.
        sandbox_id: What is forked.
        count: How many clones.
        snapshot: The clones are what it was then. Empty: what it is now.

    Raises:
        BenchmarkError: A clone's state is not that of the source.
    """
    began = time.perf_counter()
    wish = {"snapshot": snapshot} if snapshot else {}
    clones: list[dict[str, Any]] = (await keeper.do("fork", sandbox_id, n=count, **wish))["sandboxes"]
    forked = time.perf_counter()
    kernel_ids = [str(clone["kernel_id"]) for clone in clones]
    try:
        async with contextlib.AsyncExitStack() as stack:

            async def answer(kernel_id: str) -> Any:
                client = await stack.enter_async_context(keeper.client(kernel_id))
                await client.execute("1")
                return client

            clients = await asyncio.gather(*(answer(kernel_id) for kernel_id in kernel_ids))
            answered = time.perf_counter()
            if len(clients) != count:
                raise BenchmarkError(f"{len(clients)} of {count} clones came")
            await clients[0].execute(CHECK)
    finally:
        await keeper.remove(kernel_ids)
    await keeper.settled()
    return {"fork": forked - began, "execute": answered - forked}, clones


async def started_with_imports(server: JupyterServer) -> float:
    """Seconds of a plain start until its imports are done."""
    began = time.perf_counter()
    kernel_id = await server.start_kernel(PLAIN)
    try:
        async with server.channels(kernel_id) as kernel:
            await kernel.execute(IMPORTS)
            return time.perf_counter() - began
    finally:
        await server.delete_kernel(kernel_id)
