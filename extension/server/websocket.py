"""The websocket between a page and a kernel: no wait between small messages, and no doubt about the kernel's state."""

import asyncio
from typing import Any

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection

from warmcell.extension.server.keeping import provisioner_of

SETTING = "kernel_websocket_connection_class"

GREETING_S = 1.0
"""Without a greeting after so long, the kernel is asked as Jupyter asks any other."""


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Jupyter's own connection; each message is sent when it is there.

    A cell's messages are several small ones. TCP holds the second back until the page's machine has acknowledged the
    first, which it does after 40 ms.
    """

    _is_greeted = False
    """Whether its subscription is a new one, at a proxy of ours."""

    def connect(self) -> asyncio.Future[None] | None:  # type: ignore[override]
        """Begin to forward.

        A kernel of ours is started when it has answered. Jupyter takes it for starting until the next thing it says
        has come by another way, and looks again only after 50 ms.
        """
        if self._is_ours() and self.kernel_manager.execution_state == "starting":
            self.kernel_manager.execution_state = "idle"
        connected = super().connect()
        if connected is not None:
            # Not before: tornado is still about to reset the connection after the request that it began with.
            connected.add_done_callback(lambda _: self._begin())
        return connected

    def request_kernel_info(self) -> asyncio.Future[Any]:
        """What Jupyter asks each kernel once, only to learn which protocol it speaks: ours speak its own."""
        if self._is_ours() and not hasattr(self.kernel_manager, "_kernel_info_future"):
            self.kernel_manager._kernel_info_future = _done({})
        asked: asyncio.Future[Any] = super().request_kernel_info()  # type: ignore[no-untyped-call]
        return asked

    def create_stream(self) -> None:
        """Connect to the kernel's channels, anew."""
        super().create_stream()  # type: ignore[no-untyped-call]
        self._is_greeted = self._is_ours()

    def nudge(self) -> asyncio.Future[None]:
        """Done when the kernel's output is known to come here.

        Jupyter asks the kernel for something over two more connections until it hears of it. Our proxy greets each
        subscriber, so only that is waited for. A page that comes back may have been greeted before.
        """
        return asyncio.ensure_future(self._greeting()) if self._is_greeted else super().nudge()

    async def _greeting(self) -> None:
        iopub = self.channels["iopub"]
        heard = asyncio.Event()

        def hear(_: object) -> None:
            iopub.stop_on_recv()  # What comes next is the page's.
            heard.set()

        iopub.on_recv(hear)
        try:
            async with asyncio.timeout(GREETING_S):
                await heard.wait()
        except TimeoutError:
            if self in self._open_sockets:  # The page is still there.
                await super().nudge()

    def _begin(self) -> None:
        self._send_at_once()
        self._say_state()

    def _say_state(self) -> None:
        """Tell a page that is back what one of our kernels does.

        It asks by itself, but its question may overtake its subscription, and then it hears nothing until the kernel
        says the next thing: a suspended one not before its next cell.
        """
        state = getattr(self.kernel_manager, "execution_state", None)
        if self._is_ours() and state in ("idle", "busy"):
            self._send_status_message(state)  # type: ignore[no-untyped-call]

    def _is_ours(self) -> bool:
        return provisioner_of(self.kernel_manager) is not None

    def _send_at_once(self) -> None:
        if self.websocket_handler.ws_connection is not None:
            self.websocket_handler.set_nodelay(True)


def _done(result: dict[str, Any]) -> asyncio.Future[dict[str, Any]]:
    done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    done.set_result(result)
    return done


def use_prompt_connections(settings: dict[str, Any]) -> None:
    """For all kernels of the server with these settings, unless it was told to use other connections than its own."""
    if settings.get(SETTING) is ZMQChannelsWebsocketConnection:
        settings[SETTING] = PromptConnection
