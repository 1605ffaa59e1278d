"""P1: from `POST /api/kernels` to the kernel's first reply, sandboxed beside plain."""

import contextlib
import time
from collections.abc import Mapping

from benchmarks.rows import Row, Series, medians
from benchmarks.server import BenchmarkError, JupyterServer
from tests.leaks import own_places

ROUNDS = 20
PLAIN, OURS = "python3", "warmcell"


async def measure(*, rounds: int = ROUNDS) -> list[Row]:
    """Two rows: with a prepared sandbox waiting, and with none (a plain start in a new sandbox).

    The kernels are started alternately; between two of them the next sandbox is prepared, so that
    no import runs beside what is measured.
    """
    found: dict[str, list[Mapping[str, float]]] = {"plain": [], "prepared": [], "empty": []}
    async with contextlib.AsyncExitStack() as stack:
        places = [stack.enter_context(own_places()) for _ in range(2)]
        server = await stack.enter_async_context(JupyterServer(places[0]))
        empty = await stack.enter_async_context(JupyterServer(places[1], settings={"prepared": 0}))
        await first_reply(server, PLAIN)  # Files are in the page cache from here on.
        await first_reply(empty, OURS)
        template_in_use = await server.start_kernel(OURS)
        await server.warm()
        await server.delete_kernel(template_in_use)
        for number in range(rounds):
            kinds = ("plain", "prepared", "empty") if number % 2 else ("empty", "prepared", "plain")
            for kind in kinds:
                await server.warm()
                if kind == "plain":
                    found[kind].append(await first_reply(server, PLAIN))
                elif kind == "prepared":
                    found[kind].append(await first_reply(server, OURS, started_from="template"))
                else:
                    found[kind].append(await first_reply(empty, OURS, started_from="cold"))
    plain = Series(what=f"{PLAIN} kernelspec", samples_s=[sum(parts.values()) for parts in found["plain"]])
    return [
        Row(
            promise="P1",
            what=what,
            baseline=plain,
            ours=Series(what=f"{OURS} kernelspec", samples_s=[sum(parts.values()) for parts in found[kind]]),
            limit=0.35 if kind == "prepared" else None,
            goal=0.15 if kind == "prepared" else None,
            parts_s=medians(found[kind]),
        )
        for kind, what in (
            ("prepared", "new kernel → first reply"),
            ("empty", "the same with no sandbox prepared"),
        )
    ]


async def first_reply(server: JupyterServer, name: str, *, started_from: str | None = None) -> dict[str, float]:
    """Start a kernel, have it answer, delete it: seconds of each part.

    Args:
        started_from: What Warmcell must say of this start; anything is good if None.

    Raises:
        BenchmarkError: It was started from something else.
    """
    began = time.perf_counter()
    kernel_id = await server.start_kernel(name)
    try:
        started = time.perf_counter()
        async with server.channels(kernel_id) as kernel:
            opened = time.perf_counter()
            await kernel.execute("1")
            replied = time.perf_counter()
        if started_from is not None:
            told = (await server.sandbox(kernel_id))["started_from"]
            if told != started_from:
                raise BenchmarkError(f"this start was to be measured from {started_from}, and was from {told}")
    finally:
        await server.delete_kernel(kernel_id)
    return {"POST": started - began, "websocket": opened - started, "execute": replied - opened}
