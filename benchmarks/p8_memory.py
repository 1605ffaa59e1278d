"""P8: memory of an idle kernel with torch imported, twenty of them running, beside one plain kernel that is alone.

Memory is the proportional set size (PSS) of all processes of a sandbox, its first processes and a template that waits
in it included: a page that several processes have counts for each by its share. The plain kernel is measured while
nothing else maps its libraries, so all of their pages count for it. What a second plain kernel has for itself alone is
the least that each further one takes; it is the baseline of the second row, of which nothing is promised.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.keeper import processes
from benchmarks.p1_start import OURS, PLAIN, STARTS, told_start
from benchmarks.rows import ENGINES, Engine, Row, Series
from benchmarks.server import BenchmarkError, JupyterServer
from tests.leaks import own_places

KERNELS = 20
PLAIN_PAIRS = 3
TORCH = "import torch"
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
        async with JupyterServer(places, settings=STARTS[engine]) as server:
            kernel_ids = [await server.start_kernel(OURS)]  # Not from the template, which there is none of yet.
            await server.warm()
            await server.delete_kernel(kernel_ids.pop())
            for _ in range(count):
                await server.warm()
                kernel_ids.append(await server.start_kernel(OURS))
                async with server.channels(kernel_ids[-1]) as kernel:
                    await kernel.execute(TORCH)
                await told_start(server, kernel_ids[-1], engine)
            ids = [str((await server.sandbox(kernel_id))["id"]) for kernel_id in kernel_ids]
            found = sandboxes_bytes(places.runtime)
            missing = [one for one in ids if one not in found]
            if missing:
                raise BenchmarkError(f"no process of the sandboxes {', '.join(missing)} was found")
            for kernel_id in kernel_ids:
                await server.delete_kernel(kernel_id)
    return [found[one] for one in ids]


def sandboxes_bytes(runtime: Path) -> dict[str, float]:
    """PSS of all processes of each sandbox of the keeper with this runtime directory.

    Raises:
        BenchmarkError: Some of them may not be looked at.
    """
    found: dict[str, float] = {}
    for one in processes():
        sandbox = _sandbox_of(one.pid, runtime)
        if sandbox is not None:
            found[sandbox] = found.get(sandbox, 0.0) + memory_bytes(one.pid, WHOLE)
    return found


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


def _sandbox_of(pid: int, runtime: Path) -> str | None:
    """The sandbox whose run directory is mounted where this process lives."""
    try:
        said = Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return None
    mounted = re.search(rf"{re.escape(runtime.name)}/s/(\w+)", said) if runtime.parent.name in said else None
    return None if mounted is None else mounted[1]
