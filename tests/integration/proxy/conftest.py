"""A proxy with clients of jupyter_client's on one side and a guest of libzmq's on the other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import zmq
import zmq.asyncio
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.session import Session

from tests.leaks import Places
from warmcell.kernel_provisioner.proxy import Connection, KernelProxy

TIMEOUT_S = 60.0


class Guest:
    """What a kernel is to the proxy: unsigned sockets that answer. Small enough to be told what to do."""

    def __init__(self, prefix: str, *, name: str = "guest", queue: int = 1000) -> None:
        self.prefix = prefix
        self.name = name
        self.requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.mute = False
        """It answers, and publishes nothing."""
        self.reading = asyncio.Event()
        """It reads no requests while this is not set."""
        self.reading.set()
        self._session = Session(key=b"")
        self._context = zmq.asyncio.Context()
        self._tasks: list[asyncio.Task[None]] = []
        self.sockets = {
            channel: self._context.socket(zmq.XPUB if channel == "iopub" else zmq.ROUTER)
            for channel in ("shell", "iopub", "stdin", "control")
        }
        self.sockets["iopub"].xpub_nodrop = True
        for socket in self.sockets.values():
            socket.sndhwm = socket.rcvhwm = queue

    def start(self, *channels: str) -> None:
        """Bind and answer; only these channels if some are named."""
        for number, channel in enumerate(("shell", "iopub", "stdin", "control"), 1):
            if not channels or channel in channels:
                self.sockets[channel].bind(f"ipc://{self.prefix}-{number}")
        self._tasks = [asyncio.create_task(self._answer(channel)) for channel in ("shell", "control")]

    async def _answer(self, channel: str) -> None:
        while True:
            await self.reading.wait()
            route, rest = self._session.feed_identities(await self.sockets[channel].recv_multipart())
            await self.reading.wait()
            request = {**self._session.deserialize(rest), "route": route, "channel": channel}
            self.publish("status", {"execution_state": "busy"}, request)
            if request["msg_type"] == "kernel_info_request":
                self.reply(request, {"status": "ok", "implementation": self.name})
                self.publish("status", {"execution_state": "idle"}, request)
            else:
                await self.requests.put(request)

    def publish(self, kind: str, content: dict[str, Any], parent: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Say something on iopub."""
        if self.mute:
            return
        self._session.send(self.sockets["iopub"], kind, content, parent=parent, ident=kind.encode(), **kwargs)

    def reply(self, request: dict[str, Any], content: dict[str, Any]) -> None:
        """Answer a request where it came from."""
        kind = request["msg_type"].replace("_request", "_reply")
        self._session.send(self.sockets[request["channel"]], kind, content, parent=request, ident=request["route"])

    def finish(self, request: dict[str, Any]) -> None:
        """Answer a cell and be idle."""
        self.reply(request, {"status": "ok", "execution_count": 1})
        self.publish("status", {"execution_state": "idle"}, request)

    async def asked(self) -> dict[str, Any]:
        """The next request that is not kernel_info."""
        return await asyncio.wait_for(self.requests.get(), TIMEOUT_S)

    async def end(self, *, linger_ms: int = 1000) -> None:
        """Close everything, as a process's end does; what was said is still sent. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for socket in self.sockets.values():
            socket.close(linger=linger_ms)
        await asyncio.to_thread(self._context.term)


class Rig:
    """One proxy, its guests and its clients."""

    def __init__(self, places: Places, stack: contextlib.AsyncExitStack, connection: Connection, **how: Any) -> None:
        self.connection = connection
        self.proxy = KernelProxy(connection, name="test", **how)
        self._places = places
        self._stack = stack
        self._guests = 0

    async def guest(self, *, connect: bool = True, start: bool = True, queue: int = 1000) -> Guest:
        """A new guest, behind the proxy and ready unless told otherwise; libzmq queues so many messages for it."""
        self._guests += 1
        made = Guest(str(self._places.root / f"g{self._guests}"), name=f"guest {self._guests}", queue=queue)
        self._stack.push_async_callback(made.end, linger_ms=0)
        if start:
            made.start()
        if connect:
            await self.proxy.connect_guest(made.prefix)
            await self.proxy.wait_ready(timeout=TIMEOUT_S)
        return made

    def client(self, **overrides: Any) -> AsyncKernelClient:
        """A client of jupyter_client's, with its channels open."""
        made = AsyncKernelClient()
        made.load_connection_info({**self.connection.to_json(), **overrides})  # type: ignore[typeddict-item]
        made.start_channels(hb=False)
        self._stack.callback(made.stop_channels)
        return made

    async def subscribed(self) -> AsyncKernelClient:
        """A client that has been told that its subscription works."""
        made = self.client()
        message = await made.get_iopub_msg(timeout=TIMEOUT_S)
        assert message["msg_type"] == "iopub_welcome"
        return made


def ipc(places: Places, **changes: Any) -> Connection:
    """A connection on sockets of this test's."""
    ports = {f"{channel}_port": n for n, channel in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
    return Connection.from_json({**ports, "transport": "ipc", "ip": str(places.root / "h"), "key": "secret", **changes})


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the proxy's thread does."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - a thread's attribute has no event
            await asyncio.sleep(0.001)


MakeRig = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def make_rig(places: Places) -> AsyncIterator[MakeRig]:
    async with contextlib.AsyncExitStack() as stack:

        async def make(connection: Connection, **how: Any) -> Rig:
            made = Rig(places, stack, connection, **how)
            stack.push_async_callback(made.proxy.close)
            await made.proxy.start()
            return made

        yield make


@pytest.fixture
async def rig(make_rig: MakeRig, places: Places) -> Rig:
    return await make_rig(ipc(places))
