"""P8: memory of an idle kernel with torch imported, twenty of them running, beside one plain kernel that is alone.

Memory is the proportional set size (PSS) of all processes of a sandbox, its first processes and a template that waits
in it included: a page that several processes have counts for each by its share. The plain kernel is measured while
nothing else maps its libraries, so all of their pages count for it. What a second plain kernel has for itself alone is
the least that each further one takes; it is the baseline of the second row, of which nothing is promised.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.keeper import Process, processes
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
WHOLE, OWN = ("Pss:",), ("Private_Clean:", "Private_Dirty:")


async def measure(*, kernels: int = KERNELS, engines: Sequence[Engine] = ENGINES) -> list[Row]:
    """Two rows for each engine: beside a plain kernel that is alone, and beside what one more plain kernel takes."""
    alone, further = await plain_kernels()
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


async def plain_kernels(pairs: int = PLAIN_PAIRS) -> tuple[list[float], list[float]]:
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
            found = sandboxes_bytes(places.runtime)
            for kernel_id in kernel_ids:
                await server.delete_kernel(kernel_id)
    if len(found) != count:
        raise BenchmarkError(f"{len(found)} of the sandboxes of {count} kernels were found")
    return found


def sandboxes_bytes(runtime: Path) -> list[float]:
    """PSS of all processes of each sandbox of this keeper in which a kernel has been named.

    Raises:
        BenchmarkError: Some of them may not be looked at.
    """
    table = {one.pid: one for one in processes()}
    firsts = {pid for pid in table if _has_mounts(pid, runtime)}
    inside: dict[int, list[Process]] = {}
    for one in table.values():
        above: int = one.pid
        while above in table and above not in firsts:
            above = table[above].parent
        if above in firsts:
            inside.setdefault(above, []).append(one)
    return [
        sum(memory_bytes(one.pid, WHOLE) for one in sandbox)
        for sandbox in inside.values()
        if any(one.name.startswith(NAME) for one in sandbox)
    ]


def memory_bytes(pid: int, kinds: tuple[str, ...]) -> float:
    """The sum of these rows of what the system says of a process's memory.

    Raises:
        BenchmarkError: It may not be looked at.
    """
    try:
        said = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except ProcessLookupError:
        return 0.0
    except OSError as error:
        raise BenchmarkError(f"the memory of process {pid} may not be looked at: {error.strerror}") from error
    return 1024.0 * sum(int(line.split()[1]) for line in said.splitlines() if line.startswith(kinds))


def _has_mounts(pid: int, runtime: Path) -> bool:
    """Whether this is the process that mounts a sandbox's things; none of those inside show them."""
    try:
        return f" {runtime}/s/" in Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return False
