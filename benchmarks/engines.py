"""Which engines there are to measure, found out with real kernels: one saved, and one started anew."""

from benchmarks.keeper import Keeper
from benchmarks.p1_start import OURS, STARTS, TOLD
from benchmarks.server import JupyterServer
from tests.leaks import own_places
from warmcell.sandbox.errors import UnsupportedOperationError


async def why_no_snapshots() -> str:
    """Why the memory of a kernel cannot be saved, as whoever runs this; empty where it can."""
    with own_places() as places:
        async with JupyterServer(places, settings=STARTS["criu"]) as server:
            kernel_id = await server.start_kernel(OURS)
            try:
                async with Keeper(places) as keeper:
                    await keeper.do("snapshot", (await keeper.sandbox(kernel_id))["id"], name="probe")
            except UnsupportedOperationError as error:
                return f"{error.message}. {error.hint}"
            finally:
                await server.delete_kernel(kernel_id)
    return ""


async def why_no_starts() -> str:
    """Why new kernels do not come from a snapshot where kernels can be saved; empty where they do."""
    with own_places() as places:
        async with JupyterServer(places, settings=STARTS["criu"]) as server:
            first = await server.start_kernel(OURS)
            await server.warm()
            second = await server.start_kernel(OURS)
            told = (await server.sandbox(second))["started_from"]
            for kernel_id in (first, second):
                await server.delete_kernel(kernel_id)
    return "" if told == TOLD["criu"] else f"new kernels come from: {told}"
