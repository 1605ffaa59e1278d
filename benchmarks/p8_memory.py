"""P8: memory of an idle kernel with torch imported, twenty of them running, beside one plain kernel that is alone.

Memory is the proportional set size (PSS) of all processes of a sandbox: a page that several processes have counts for
each by its share. A sandbox's first processes, a template that waits in it and the helper's process that holds it are
included. The plain kernel is measured while nothing else maps its libraries, so all of their pages count for it. What a
second plain kernel has for itself alone is the least that each further one takes; it is the baseline of the second row,
of which nothing is promised.
"""

import contextlib
from collections.abc import Mapping, Sequence

from benchmarks.keeper import Keeper, Process, processes
from benchmarks.memory import OWN, WHOLE, memory_bytes
from benchmarks.p1_start import OURS, PLAIN, STARTS, check_start, in_use
from benchmarks.rows import ENGINES, Engine, Row, Series
from benchmarks.server import BenchmarkError, JupyterServer
from tests.leaks import own_places

KERNELS = 20
PLAIN_PAIRS = 2
TORCH = "import torch"
NAME = "measured-"
"""What these kernels call their process, so that they are told from what waits in the pool."""
GOALS: Mapping[Engine, float] = {"criu": 0.15, "template": 0.3}
HELPER = "warmcell-helper"


async def measure(
    *, kernels: int = KERNELS, pairs: int = PLAIN_PAIRS, engines: Sequence[Engine] = ENGINES
) -> list[Row]:
    """Two rows for each engine: beside a plain kernel that is alone, and beside what one more plain kernel takes."""
    alone, further = await plain_kernels(pairs)
    found = {engine: await sandboxed_kernels(kernels, engine=engine) for engine in engines}
    return [
        Row(
            promise="P8",
            what=what,
            engine=engine,
            baseline=baseline,
            ours=Series(what=f"{kernels} {OURS} kernels, each", samples=found[engine], unit="bytes"),
            goal=goals.get(engine),
        )
        for what, baseline, goals in (
            (
                f"memory per idle kernel with torch, {kernels} of them",
                Series(what=f"one {PLAIN} kernel, alone", samples=alone, unit="bytes"),
                GOALS,
            ),
            (
                "the same, beside what one more plain kernel takes",
                Series(what=f"private pages of one more {PLAIN} kernel", samples=further, unit="bytes"),
                {},
            ),
        )
        for engine in engines
    ]


async def plain_kernels(pairs: int) -> tuple[list[float], list[float]]:
    """PSS of one that is alone, and the private pages of another beside it, in bytes."""
    alone: list[float] = []
    further: list[float] = []
    with own_places() as places:
        async with JupyterServer(places) as server:
            for _ in range(pairs):
                async with contextlib.AsyncExitStack() as stack:
                    first = await plain_kernel(server, stack)
                    alone.append(memory_bytes(first, WHOLE))
                    further.append(memory_bytes(await plain_kernel(server, stack), OWN))
    return alone, further


async def plain_kernel(server: JupyterServer, stack: contextlib.AsyncExitStack) -> int:
    """Pid of a plain kernel that has torch and nothing to do; it ends with the stack."""
    kernel_id = await server.start_kernel(PLAIN)
    stack.push_async_callback(server.delete_kernel, kernel_id)
    async with server.channels(kernel_id) as kernel:
        said = await kernel.execute(f"{TORCH}, os", expressions={"pid": "os.getpid()"})
    return int(said["user_expressions"]["pid"]["data"]["text/plain"])


async def sandboxed_kernels(count: int, *, engine: Engine) -> list[float]:
    """PSS of the sandbox of each of so many kernels, in bytes."""
    with own_places() as places:
        async with JupyterServer(places, settings={**STARTS[engine], "prepared_memory": 16.0}) as server:
            await in_use(server, prepared=True)
            kernel_ids: list[str] = []
            for number in range(count):
                await server.warm()
                kernel_ids.append(await server.start_kernel(OURS))
                async with server.channels(kernel_ids[-1]) as kernel:
                    await kernel.execute(f"{TORCH}; open('/proc/self/comm', 'w').write('{NAME}{number}')")
                check_start(await server.sandbox(kernel_ids[-1]), "template")
            async with Keeper(places) as keeper:
                found = sandboxes_bytes(keeper.pid())
            for kernel_id in kernel_ids:
                await server.delete_kernel(kernel_id)
    if len(found) != count:
        raise BenchmarkError(f"{len(found)} of the sandboxes of {count} kernels were found")
    return found


def sandboxes_bytes(keeper: int) -> list[float]:
    """PSS of all processes of each sandbox in which a kernel has been named.

    Args:
        keeper: Its pid. A sandbox is what lies below it, or below the machine's helper.

    Raises:
        BenchmarkError: Some of them may not be looked at.
    """
    table = {one.pid: one for one in processes()}
    makers = {keeper, *(pid for pid, one in table.items() if one.name == HELPER)}
    inside: dict[int, list[Process]] = {}
    for one in table.values():
        top = one
        while top.parent in table and top.parent not in makers:
            top = table[top.parent]
        if top.parent in makers:
            inside.setdefault(top.pid, []).append(one)
    return [
        sum(memory_bytes(one.pid, WHOLE) for one in sandbox)
        for sandbox in inside.values()
        if any(one.name.startswith(NAME) for one in sandbox)
    ]
