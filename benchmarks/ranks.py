"""Two notebooks beside each other: one with `%%remote`, one with the engines of an ipyparallel cluster."""

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from benchmarks.server import OURS, PLAIN, Channels, JupyterServer
from tests.leaks import own_places

ENGINES = 8
CLUSTER_TIMEOUT_S = 120

CLUSTER = f"""
import ipyparallel as ipp
cluster = ipp.Cluster(n={ENGINES}, log_level=40, engine_timeout={CLUSTER_TIMEOUT_S})
client = cluster.start_and_connect_sync()
views = {{n: client[:n] for n in range(1, {ENGINES} + 1)}}
for n, view in views.items():
    view.block = True
    view.activate(str(n))
"""
END_CLUSTER = "client.close()\ncluster.stop_cluster_sync()"

MAKE = "import numpy as np\nx = np.random.default_rng(1).integers(0, 256, {size}, dtype='u1')"
CHANGE = "x[:8] = np.frombuffer(np.int64({number}).tobytes(), 'u1')"
CHECK = "assert len(x) == {size}, len(x)"
FORGET = "del x"


@dataclass(frozen=True, slots=True)
class Pair:
    """Kernels of one server, each of which answers over a websocket that stays open."""

    ours: Channels
    """In a sandbox."""
    theirs: Channels
    """A plain kernel, whose cluster has eight engines."""

    async def started(self, ranks: int) -> None:
        """Have that many ranks, and as many engines that have run something."""
        await self.ours.run(f"%%remote n={ranks}\nimport numpy as np")
        await self.theirs.run(f"%px{ranks} import numpy as np")

    async def ended(self) -> None:
        """Have no ranks any more, so that what is measured next has the machine for itself."""
        await self.ours.run("%remote close")

    async def trivial(self, ranks: int) -> tuple[float, float]:
        """Seconds of a cell that does nothing, by `%%remote` and by `%px`."""
        return (
            await timed(self.ours, f"%%remote n={ranks}\npass"),
            await timed(self.theirs, f"%px{ranks} pass"),
        )

    async def filled(self, size: int) -> None:
        """Have an array of that many bytes in both notebooks."""
        for one in (self.ours, self.theirs):
            await one.run(MAKE.format(size=size))

    async def sent(self, ranks: int, number: int, size: int) -> float:
        """Seconds in which an array reaches ranks that have none, or another one."""
        await self.ours.run(CHANGE.format(number=number))
        seconds = await timed(self.ours, f"%%remote n={ranks} send=x\npass")
        await self.ours.run(f"%%remote n={ranks}\n{CHECK.format(size=size)}; {FORGET}")
        return seconds

    async def pushed(self, engines: int, number: int, size: int) -> float:
        """Seconds in which it reaches engines."""
        await self.theirs.run(CHANGE.format(number=number))
        seconds = await timed(self.theirs, f"views[{engines}].push({{'x': x}})")
        await self.theirs.run(f"%px{engines} {CHECK.format(size=size)}; {FORGET}")
        return seconds


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """A server with both."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places())))
        kernels = []
        for name in (OURS, PLAIN):
            kernel_id = await server.start_kernel(name)
            stack.push_async_callback(server.delete_kernel, kernel_id)
            kernels.append(await stack.enter_async_context(server.channels(kernel_id)))
        ours, theirs = kernels
        await server.warm()
        await theirs.run(CLUSTER)
        stack.push_async_callback(theirs.run, END_CLUSTER)
        yield Pair(ours, theirs)


async def timed(kernel: Channels, cell: str) -> float:
    """Seconds from a cell's request to its reply; then nothing of it is still under way."""
    began = time.perf_counter()
    await kernel.execute(cell)
    seconds = time.perf_counter() - began
    await kernel.run("1")
    return seconds
