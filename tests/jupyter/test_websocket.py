"""The websocket between a page and a kernel."""

import time

import pytest
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager

from benchmarks.server import JupyterServer
from tests.leaks import Places
from warmcell.extension.server.websocket import PromptConnection
from warmcell.kernel_provisioner.provisioner import WarmcellProvisioner

DELAYED_ACKNOWLEDGEMENT_S = 0.040
"""How long Linux may hold back an acknowledgement, and with it each message but the first."""


@pytest.mark.alone
async def test_a_cells_messages_do_not_wait_for_acknowledgements(places: Places) -> None:
    """Of many cells some are answered sooner than TCP would give out small messages by itself."""
    took = [1.0]
    async with JupyterServer(places) as server:
        kernel_id = await server.start_kernel("python3")
        async with server.channels(kernel_id) as kernel:
            while min(took) >= DELAYED_ACKNOWLEDGEMENT_S and len(took) < 200:  # A busy machine may be slow for long.
                began = time.perf_counter()
                await kernel.execute("1")
                took.append(time.perf_counter() - began)
        await server.delete_kernel(kernel_id)
    assert min(took) < DELAYED_ACKNOWLEDGEMENT_S, took


def test_a_kernel_of_ours_is_not_taken_for_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has answered, so a page that connects need not wait until Jupyter has heard the next thing from it."""
    seen = []
    monkeypatch.setattr(
        ZMQChannelsWebsocketConnection, "connect", lambda self: seen.append(self.kernel_manager.execution_state)
    )
    ours, theirs, busy = (ServerKernelManager(execution_state=state) for state in ("starting", "starting", "busy"))
    for manager in (ours, busy):
        manager.provisioner = WarmcellProvisioner(parent=manager, kernel_id="kernel")
        manager.provisioner._running = True
    for manager in (ours, theirs, busy):
        PromptConnection(parent=manager).connect()
    assert seen == ["idle", "starting", "busy"]
