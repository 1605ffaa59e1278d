"""The websocket between a page and a kernel, without the wait that TCP puts between small messages."""

import asyncio
from typing import Any

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection

SETTING = "kernel_websocket_connection_class"


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Jupyter's own connection; each message is sent when it is there.

    A cell's messages are several small ones. TCP holds the second back until the page's machine has acknowledged the
    first, which it does after 40 ms.
    """

    def connect(self) -> asyncio.Future[None] | None:  # type: ignore[override]
        """Begin to forward."""
        connected = super().connect()
        if connected is not None:
            # Not before: tornado is still about to reset the connection after the request that it began with.
            connected.add_done_callback(lambda _: self._send_at_once())
        return connected

    def _send_at_once(self) -> None:
        if self.websocket_handler.ws_connection is not None:
            self.websocket_handler.set_nodelay(True)


def use_prompt_connections(settings: dict[str, Any]) -> None:
    """For all kernels of the server with these settings, unless it was told to use other connections than its own."""
    if settings.get(SETTING) is ZMQChannelsWebsocketConnection:
        settings[SETTING] = PromptConnection
