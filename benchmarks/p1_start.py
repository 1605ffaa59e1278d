"""P1: from `POST /api/kernels` to the kernel's first reply, sandboxed beside plain."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rows import ENGINES, Engine, Row, Series, medians, phases
from benchmarks.server import OURS, PLAIN, BenchmarkError, JupyterServer
from tests.leaks import own_places

ROUNDS = 10
GOALS: Mapping[Engine, float] = {"criu": 0.1, "template": 0.15}

STARTS: Mapping[Engine, Mapping[str, object]] = {
    "criu": {"snapshots": "auto", "keeper_idle_s": 600.0},
    "template": {"snapshots": "none", "keeper_idle_s": 600.0},
}
"""How a keeper is configured so that new kernels come from there, and so that it stays while others are measured."""

KINDS: Mapping[str, Mapping[str, object]] = {"prepared": {}, "empty": {"prepared": 0}}


async def measure(*, rounds: int = ROUNDS, engines: Sequence[Engine] = ENGINES, python: str = "") -> list[Row]:
    """Two rows for each engine: with a sandbox prepared, and with none.

    The kernels are started alternately; between two of them the next sandbox is prepared, so that
    no import runs beside what is measured.
    """
    plain: list[float] = []
    parts: dict[tuple[Engine, str], list[Mapping[str, float]]] = {}
    told: dict[tuple[Engine, str], list[Mapping[str, Any]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        servers: dict[tuple[Engine, str], JupyterServer] = {}
        for engine in engines:
            for kind, settings in KINDS.items():
                places = stack.enter_context(own_places())
                server = JupyterServer(places, settings={**STARTS[engine], **settings}, python=python)
                servers[engine, kind] = await stack.enter_async_context(server)
                await in_use(server, prepared=kind == "prepared")
        server = servers[engines[0], "prepared"]
        await first_reply(server, PLAIN)  # Its files are in the page cache from here on.
        for number in range(rounds):
            for which in (None, *servers) if number % 2 else (*reversed(servers), None):
                for engine in engines:
                    await servers[engine, "prepared"].warm()
                if which is None:
                    plain.append(sum((await first_reply(server, PLAIN))[0].values()))
                    continue
                kind = which[1]
                start = "template" if kind == "prepared" else None
                took, info = await first_reply(servers[which], OURS, started_from=start)
                parts.setdefault(which, []).append(took)
                told.setdefault(which, []).append(info)
    baseline = Series(what=f"{PLAIN} kernelspec", samples=plain)
    return [
        Row(
            promise="P1",
            what=what,
            engine=engine,
            baseline=baseline,
            ours=Series(what=f"{OURS} kernelspec", samples=[sum(took.values()) for took in parts[engine, kind]]),
            goal=GOALS[engine] if kind == "prepared" else None,
            parts_s=medians(parts[engine, kind]),
            phases_s=phases(told[engine, kind]),
        )
        for kind, what in (("prepared", "new kernel → first reply"), ("empty", "the same with no sandbox prepared"))
        for engine in engines
    ]


async def in_use(server: JupyterServer, *, prepared: bool) -> None:
    """Start and end a first kernel, and wait until all is there that the next ones start from."""
    kernel_id = await server.start_kernel(OURS)
    await server.warm(prepared=prepared)
    await server.delete_kernel(kernel_id)


async def first_reply(
    server: JupyterServer, name: str, *, started_from: str | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Start a kernel, have it answer, delete it: seconds of each part, and what is told of its sandbox.

    Args:
        server: Where.
        name: Of the kernelspec.
        started_from: What Warmcell must say of this start; anything is good if None.

    Raises:
        BenchmarkError: It was started from something else.
    """
    told: dict[str, Any] = {}
    began = time.perf_counter()
    kernel_id = await server.start_kernel(name)
    try:
        started = time.perf_counter()
        async with server.channels(kernel_id) as kernel:
            opened = time.perf_counter()
            await kernel.execute("1")
            replied = time.perf_counter()
        if name == OURS:
            told = await server.sandbox(kernel_id)
            check_start(told, started_from or told["started_from"])
    finally:
        await server.delete_kernel(kernel_id)
    return {"POST": started - began, "websocket": opened - started, "execute": replied - opened}, told


def check_start(told: Mapping[str, Any], started_from: str) -> None:
    """Raise if that is not where the kernel came from.

    Raises:
        BenchmarkError: It was started from something else.
    """
    if told["started_from"] != started_from:
        raise BenchmarkError(f"a start was to be measured from {started_from}, and was from {told['started_from']}")
