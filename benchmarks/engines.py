"""Which engines there are to measure, found out with real kernels: one saved, and one started anew."""

from benchmarks.keeper import Keeper
from benchmarks.p1_start import STARTS, in_use
from benchmarks.server import OURS, JupyterServer
from tests.leaks import own_places
from warmcell.sandbox.errors import UnsupportedOperationError


async def why_no_snapshots(*, python: str = "") -> str:
    """Why the memory of a kernel cannot be saved, as whoever runs this; empty where it can."""
    with own_places() as places:
        async with JupyterServer(places, settings=STARTS["criu"], python=python) as server:
            kernel_id = await server.start_kernel(OURS)
            try:
                async with Keeper(places) as keeper:
                    await keeper.do("snapshot", (await keeper.sandbox(kernel_id))["id"], name="probe")
            except UnsupportedOperationError as error:
                return f"{error.message}. {error.hint}"
            finally:
                await server.delete_kernel(kernel_id)
    return ""


async def why_no_starts(*, python: str = "") -> str:
    """Why new kernels do not come from a snapshot where kernels can be saved; empty where they do."""
    with own_places() as places:
        async with JupyterServer(places, settings=STARTS["criu"], python=python) as server:
            await in_use(server, prepared=True)
            async with Keeper(places) as keeper:
                kinds = {snapshot["kind"] for snapshot in await keeper.snapshots()}
    return "" if "template" in kinds else "no template was saved as a snapshot"
