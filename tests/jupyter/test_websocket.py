"""The websocket between a page and a kernel."""

import time

from benchmarks.server import JupyterServer
from tests.leaks import Places

DELAYED_ACKNOWLEDGEMENT_S = 0.040
"""How long Linux may hold back an acknowledgement, and with it each message but the first."""


async def test_a_cells_messages_do_not_wait_for_acknowledgements(places: Places) -> None:
    """Of many cells some are answered sooner than TCP would give out small messages by itself."""
    took = []
    async with JupyterServer(places) as server:
        kernel_id = await server.start_kernel("python3")
        async with server.channels(kernel_id) as kernel:
            for _ in range(20):
                began = time.perf_counter()
                await kernel.execute("1")
                took.append(time.perf_counter() - began)
        await server.delete_kernel(kernel_id)
    assert min(took) < DELAYED_ACKNOWLEDGEMENT_S, took
