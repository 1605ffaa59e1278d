"""P8: memory of an idle kernel with torch imported, twenty of them running, beside one plain kernel that is alone.

Memory is the proportional set size (PSS) of all processes of a sandbox: a page that several processes have counts for
each by its share. A sandbox's first processes, a template that waits in it and the helper's process that holds it are
included. The plain kernel is measured while nothing else maps its libraries, so all of their pages count for it. What a
second plain kernel has for itself alone is the least that each further one takes; it is the baseline of the second row,
of which nothing is promised.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import pages
from benchmarks.keeper import Keeper, Process, processes
from benchmarks.memory import OWN, WHOLE, memory_bytes
from benchmarks.p1_start import STARTS, check_start, in_use
from benchmarks.rows import ENGINES, Engine, Row, Series
from benchmarks.server import OURS, PLAIN, BenchmarkError, JupyterServer
from tests.leaks import own_places
from warmcell.sandbox.paths import Paths

KERNELS = 20
PLAIN_PAIRS = 2
TORCH = "import torch"
NAME = "measured-"
"""What these kernels call their process, so that they are told from what waits in the pool."""
GOALS: Mapping[Engine, float] = {"criu": 0.15, "template": 0.3}
HELPER = "warmcell-helper"
NEST = b"backends.stage.nest"
"""In the command of what keeps the namespaces in which a template has a process of its own."""


async def measure(
    *,
    kernels: int = KERNELS,
    pairs: int = PLAIN_PAIRS,
    engines: Sequence[Engine] = ENGINES,
    and_cold: bool = True,
    python: str = "",
) -> list[Row]:
    """Two rows for each engine: beside a plain kernel that is alone, and beside what one more plain kernel takes."""
    alone, further = await plain_kernels(pairs, python=python)
    found = {engine: await sandboxed_kernels(kernels, engine=engine, python=python) for engine in engines}
    cold = (
        {"criu": await sandboxed_kernels(kernels, engine="criu", cold=True, python=python)}
        if and_cold and can_be_cold(engines)
        else {}
    )
    return [
        Row(
            promise="P8",
            what=what,
            engine=engine,
            baseline=baseline,
            ours=Series(what=f"{kernels} {OURS} kernels, each", samples=found[engine], unit="bytes"),
            cold=Series.of("their template was not in the page cache", cold.get(engine, ()), unit="bytes"),
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


async def plain_kernels(pairs: int, *, python: str = "") -> tuple[list[float], list[float]]:
    """PSS of one that is alone, and the private pages of another beside it, in bytes."""
    alone: list[float] = []
    further: list[float] = []
    with own_places() as places:
        async with JupyterServer(places, python=python) as server:
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


def can_be_cold(engines: Sequence[Engine]) -> bool:
    """Whether templates are on the disk, and this user may touch what is in the page cache of them."""
    return "criu" in engines and os.getuid() == 0


async def sandboxed_kernels(count: int, *, engine: Engine, cold: bool = False, python: str = "") -> list[float]:
    """PSS of the sandbox of each of so many kernels, in bytes.

    Where it is to be `cold`, an earlier keeper has made the template, and nothing of that is in the page cache.
    """
    with own_places() as places:
        if cold:
            async with JupyterServer(places, settings=STARTS[engine], python=python) as server:
                await in_use(server, prepared=True)
            pages.forget(Paths(runtime=places.runtime, state=places.state, leases=places.leases).images)
        settings = {**STARTS[engine], "prepared_memory": 16.0}
        async with JupyterServer(places, settings=settings, python=python) as server:
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

    What serves several of them, as the process of a template does that their kernels are forks of, counts for each of
    them by its share.

    Args:
        keeper: Its pid. What belongs to a sandbox lies below it, or below the machine's helper.

    Raises:
        BenchmarkError: Some of them may not be looked at.
    """
    table = {one.pid: one for one in processes()}
    makers = {keeper, *(pid for pid, one in table.items() if one.name == HELPER)}
    above = {pid: chain for pid in table if (chain := _chain(pid, table, makers))}
    inside: dict[str, list[int]] = {}
    for pid in above:
        inside.setdefault(_namespace(pid), []).append(pid)
    sandboxes = [
        {up for pid in pids for up in above[pid]}
        for pids in inside.values()
        if any(table[pid].name.startswith(NAME) for pid in pids)
    ]
    # Its only child is a fork of it that does nothing, and may not be looked at.
    nests = {pid for pid, chain in above.items() if chain == [pid] and NEST in _command(pid)}
    sandboxes = [sandbox | nests for sandbox in sandboxes]
    bytes_of = {pid: memory_bytes(pid, WHOLE) for pid in set().union(*sandboxes)}
    shares = {pid: sum(pid in sandbox for sandbox in sandboxes) for pid in bytes_of}
    return [sum(bytes_of[pid] / shares[pid] for pid in sandbox) for sandbox in sandboxes]


def _chain(pid: int, table: Mapping[int, Process], makers: set[int]) -> list[int]:
    """That process and those above it, as far as they lie below a maker; empty where it does not."""
    chain = [pid]
    while table[chain[-1]].parent in table:
        if table[chain[-1]].parent in makers:
            return chain
        chain.append(table[chain[-1]].parent)
    return []


def _namespace(pid: int) -> str:
    """The pid namespace of a process; empty where it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
