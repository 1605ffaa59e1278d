"""A kernel's channels over one WebSocket, in both of Jupyter's forms: JSON with binary parts, and its `v1`."""

import asyncio
import contextlib
import json
import uuid
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.jsonutil import json_default
from jupyter_client.session import Session
from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.base.websocket import WebSocketMixin
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from warmcell.extension.server.jupyter_api import forms
from warmcell.extension.server.jupyter_api.callers import KernelsApiHandler
from warmcell.sandbox.errors import UnauthenticatedError, WarmcellError

V1 = "v1.kernel.websocket.jupyter.org"
CHANNELS = ("shell", "control", "stdin", "iopub")
ASK_AGAIN_S = 0.5
READY_TIMEOUT_S = 60.0
ASK_HOLDER_S = 300
GOING_AWAY, POLICY_VIOLATION = 1001, 1008
REASON_MAX = 100
"""Characters of the reason for which a WebSocket is closed, of which there may be 123 bytes."""


def connected(settings: dict[str, Any]) -> Counter[str]:
    """How many clients each kernel has by way of the server with these settings."""
    counter: Counter[str] = settings.setdefault("warmcell_jupyter_clients", Counter())
    return counter


class Channels:
    """The ZeroMQ sockets of one client of a kernel, at the kernel's proxy."""

    def __init__(self, connection: Mapping[str, Any]) -> None:
        """Connect. Messages are signed here, so that whoever is at the other end needs no key."""
        self.context = zmq.asyncio.Context()
        ports = {name: connection[name] for name in connection if name.endswith("_port")}
        client = AsyncKernelClient(
            context=self.context, transport=connection["transport"], ip=connection["ip"], **ports
        )
        self.session = Session(key=str(connection["key"]).encode())
        identity = uuid.uuid4().hex.encode()  # one for all, so that a question finds whoever has asked
        self.sockets: dict[str, Any] = {
            "shell": client.connect_shell(identity=identity),
            "control": client.connect_control(identity=identity),
            "stdin": client.connect_stdin(identity=identity),
            "iopub": client.connect_iopub(),
        }

    def send(self, channel: str, parts: list[bytes]) -> None:
        """Sign a message and send it."""
        self.session.send_raw(self.sockets[channel], parts)

    async def receive(self, channel: str) -> list[bytes]:
        """The next message, without identities and signature."""
        frames: list[bytes] = await self.sockets[channel].recv_multipart()
        _, rest = self.session.feed_identities(frames)
        return [bytes(part) for part in cast("list[bytes]", rest)[1:]]

    def close(self) -> None:
        """Let go of the kernel."""
        self.context.destroy(linger=0)


class ChannelsHandler(WebSocketMixin, WebSocketHandler, KernelsApiHandler):
    """One client."""

    channels: Channels | None = None
    _tasks: "tuple[asyncio.Task[None], ...]" = ()

    async def prepare(self) -> None:  # type: ignore[override]
        """As of the REST beside it."""
        await KernelsApiHandler.prepare(self)

    def set_default_headers(self) -> None:
        """Those of answers are of no use here (jupyter_server's hook)."""

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """`v1` where the client knows it."""
        return V1 if V1 in subprotocols else None

    def get_compression_options(self) -> Any:
        """As of Jupyter's own (tornado's hook)."""
        return self.settings.get("websocket_compression_options")

    @allow_unauthenticated
    async def get(self, kernel_id: str) -> None:
        """Wake the kernel and connect; whose it is was seen by then."""
        self.kernel_id = kernel_id
        info = await self.sandbox(kernel_id)
        await self.keeper.ask("POST", f"/sandboxes/{info['id']}/connect", {})
        self.connection = (await self.kernel(kernel_id))["connection"]
        await super().get(kernel_id)

    def open(self, *arguments: str, **named: str) -> None:
        """Begin to pass on what the kernel says, and have it say something: only then nothing is missed."""
        super().open(*arguments, **named)
        self.set_nodelay(True)
        self.channels = Channels(self.connection)
        connected(self.settings)[self.kernel_id] += 1
        self._asked = uuid.uuid4().hex
        self._heard, self._ready = asyncio.Event(), asyncio.Event()
        passing = (asyncio.create_task(self._pass_on(self.channels, channel)) for channel in CHANNELS)
        watching = (asyncio.create_task(self._until_refused()),) if self.principal_asks else ()
        self._tasks = (*passing, *watching, asyncio.create_task(self._until_heard(self.channels)))

    async def on_message(self, message: bytes | str) -> None:
        """From the client (tornado's hook); the next one waits for this."""
        await self._ready.wait()
        if self.channels is None:
            return
        try:
            if self.selected_subprotocol == V1 and isinstance(message, bytes):
                channel, parts = forms.from_v1(message)
            else:
                channel, parts = forms.from_json(message)
        except ValueError:
            self.close(1003, "not a message of Jupyter's")
            return
        self.channels.send(channel, parts)

    def on_close(self) -> None:
        """The client has gone (tornado's hook)."""
        super().on_close()
        channels, self.channels = self.channels, None
        if channels is not None:
            connected(self.settings)[self.kernel_id] -= 1
            self._ready.set()
            for task in self._tasks:
                task.cancel()
            channels.close()

    async def _pass_on(self, channels: Channels, channel: str) -> None:
        with contextlib.suppress(WebSocketClosedError):
            while True:
                parts = await channels.receive(channel)
                if channel == "iopub":
                    self._heard.set()
                if self._asked.encode() in parts[1]:  # what we have asked ourselves
                    continue
                if self.selected_subprotocol == V1:
                    await self.write_message(forms.to_v1(channel, parts), binary=True)
                    continue
                try:
                    told = forms.to_json(channel, parts)
                except (ValueError, RecursionError):  # a guest may say anything
                    continue
                await self.write_message(told, binary=isinstance(told, bytes))

    async def _until_refused(self) -> None:
        """Close it when the token that opened it has ended."""
        try:
            while True:
                await self.keeper.ask("GET", "/principals/self", params={"wait": str(ASK_HOLDER_S)})
        except UnauthenticatedError as error:
            self.close(POLICY_VIOLATION, error.message[:REASON_MAX])
        except WarmcellError as error:  # The keeper is gone, and with it the kernel.
            self.close(GOING_AWAY, error.message[:REASON_MAX])

    async def _until_heard(self, channels: Channels) -> None:
        """What is published before iopub is connected is lost, so ask until something comes that way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not self._heard.is_set():
                    header = channels.session.msg_header("kernel_info_request") | {"msg_id": self._asked}
                    parts = [json.dumps(part, default=json_default).encode() for part in (header, {}, {}, {})]
                    channels.send("shell", parts)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ASK_AGAIN_S):
                            await self._heard.wait()
        if self._heard.is_set():
            self._ready.set()
        else:
            self.close(1011, "the kernel does not answer")
