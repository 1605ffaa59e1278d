"""The websocket between a page and a kernel."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

import pytest
import zmq
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from zmq.eventloop.zmqstream import ZMQStream

from benchmarks.keeper import Keeper
from benchmarks.server import JupyterServer
from tests.jupyter.warmcell_kernels import NAME, configure, kernelspec
from tests.leaks import Places
from warmcell.extension.server import websocket
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


@pytest.mark.bubblewrap
async def test_a_page_that_connects_asks_the_kernel_nothing(places: Places) -> None:
    """Its first cell is the first thing that its kernel hears of it, and all that this cell says comes."""
    configure(places)
    kernelspec(places)
    async with JupyterServer(places) as server:
        kernel_id = await server.start_kernel(NAME)
        async with Keeper(places) as keeper, keeper.client(kernel_id) as other:
            await other.execute("0")
            async with server.channels(kernel_id) as page:
                await page.run("print(1)")
            asked = []
            while not asked or asked[-1] != "execute_request":  # Of another client's, whose output comes last.
                message = await other.client.get_iopub_msg(timeout=30)
                if (
                    message["msg_type"] == "status"
                    and message["parent_header"].get("session") != other.client.session.session
                ):
                    asked.append(message["parent_header"].get("msg_type"))
        await server.delete_kernel(kernel_id)
    assert set(asked) <= {"execute_request"}, asked


@contextlib.contextmanager
def subscribed(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PromptConnection, zmq.Socket[bytes], list[str]]]:
    """A connection to one of our kernels that has just subscribed, what publishes to it, and who has nudged."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher, context.socket(zmq.SUB) as subscriber:
        publisher.bind("inproc://iopub")
        subscriber.subscribe(b"")
        subscriber.connect("inproc://iopub")
        nudged: list[str] = []

        async def nudge() -> None:
            nudged.append("by Jupyter")

        manager = ServerKernelManager()
        manager.provisioner = WarmcellProvisioner(parent=manager, kernel_id="kernel")
        manager.provisioner._running = True
        monkeypatch.setattr(ZMQChannelsWebsocketConnection, "create_stream", lambda self: None)
        monkeypatch.setattr(ZMQChannelsWebsocketConnection, "nudge", lambda self: asyncio.ensure_future(nudge()))
        connection = PromptConnection(parent=manager)
        connection.create_stream()
        connection.channels = {"iopub": ZMQStream(subscriber)}
        monkeypatch.setattr(connection, "_open_sockets", {connection})
        yield connection, publisher, nudged
        connection.channels["iopub"].close()


async def test_a_greeting_proves_the_subscription(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has come nothing of the page goes to the kernel; what comes next is the page's."""
    with subscribed(monkeypatch) as (connection, publisher, nudged):
        greeted = connection.nudge()
        assert (await asyncio.wait({greeted}, timeout=0.1))[1]
        publisher.send(b"greeting")
        publisher.send(b"output")
        await asyncio.wait_for(greeted, 30)
        assert connection.channels["iopub"].socket.recv() == b"output"
        assert nudged == []


async def test_without_a_greeting_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that is being replaced greets nobody; then it is as with any other kernel, unless the page has gone."""
    monkeypatch.setattr(websocket, "GREETING_S", 0.01)
    with subscribed(monkeypatch) as (connection, _, nudged):
        await asyncio.wait_for(connection.nudge(), 30)
        assert nudged == ["by Jupyter"]
        connection._open_sockets.clear()
        await asyncio.wait_for(connection.nudge(), 30)
        assert nudged == ["by Jupyter"]
