"""What goes wrong around init costs one request and not the sandbox: no room for a process, a host that hangs up."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator

import pytest

from tests.integration.process.guest import Guest, gone, running_guest
from tests.leaks import Places
from warmcell.sandbox.errors import SandboxStartError, TransportError, WarmcellError

NO_ROOM = """
import os
from warmcell_guest.supervisor import template
template.STEADY_SECONDS = 0.0
fork = os.fork
def limited():
    if os.path.exists("trouble"):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = limited
"""
"""While there is a file of that name in the run directory the limit of processes is reached.

A fork server that ends once it is ready is started again, at once.
"""

HUNG_UP = """
import os, select
from warmcell_guest.supervisor.endpoint import Endpoint
write = Endpoint.write
def late(self, data):
    if b'"ok"' in data and os.path.exists("trouble"):
        os.unlink("trouble")
        gone = select.poll()
        gone.register(self.fd, select.POLLHUP)
        assert gone.poll(60_000)
    write(self, data)
Endpoint.write = late
"""
"""The next answer, where there is that file, begins with its removal and comes when the host has gone."""

TIMEOUT_S = 60.0


@pytest.fixture
async def crowded(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root, change=NO_ROOM) as running:
        yield running


@pytest.fixture
async def deserted(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root, change=HUNG_UP) as running:
        yield running


def descriptors(guest: Guest) -> int:
    return len(os.listdir(f"/proc/{guest.process.pid}/fd"))


async def check_no_more_than(most: int, guest: Guest) -> None:
    """What a request had is closed soon after its answer; what is never closed is found by the many that there were."""
    async with asyncio.timeout(TIMEOUT_S):
        while descriptors(guest) > most:
            await guest.channel.hello()


def left(guest: Guest, **request: object) -> None:
    """Ask, and go before there is an answer; then all is as it should be."""
    (guest.run / "trouble").touch()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(guest.run / "init.sock"))
        connection.sendall(json.dumps(request).encode() + b"\n")
        until_answering(guest)


def until_answering(guest: Guest) -> None:
    """Until init is about to answer."""
    deadline = time.monotonic() + TIMEOUT_S
    while (guest.run / "trouble").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_no_room_for_a_process_for_a_moment(crowded: Guest) -> None:
    """One request fails; those after it run and their ends are told, nothing stays open, and SIGTERM is heard."""
    trouble = crowded.run / "trouble"
    assert (await crowded.channel.exec(["true"])).exit_code == 0
    before = descriptors(crowded)
    for _ in range(4):
        trouble.touch()
        for pty in (None, (24, 80)):
            with pytest.raises(WarmcellError, match="temporarily unavailable"):
                async with crowded.channel.exec_stream(["true"], pty=pty):
                    pass
        with pytest.raises(SandboxStartError, match="could not start: Resource temporarily unavailable"):
            await crowded.kernel("cold")
        assert "Resource" in (await crowded.prepared("json"))["failed"]["fork server"]
        trouble.unlink()
        async with asyncio.timeout(TIMEOUT_S):
            assert (await crowded.channel.exec(["true"])).exit_code == 0
    await check_no_more_than(before, crowded)
    assert await (await crowded.kernel("cold")).value("1 + 1") == 2
    await crowded.prepared("json")
    assert await (await crowded.kernel("template")).value("1 + 1") == 2
    pid = crowded.process.pid
    crowded.process.terminate()
    async with asyncio.timeout(TIMEOUT_S):
        await crowded.process.wait()
    assert gone(pid)


async def test_a_template_that_cannot_be_replaced(crowded: Guest) -> None:
    """Its fork server is killed just when there is no room for another: kernels start without it, once there is."""
    await crowded.prepared()
    (crowded.run / "trouble").touch()
    (server,) = crowded.children()
    os.kill(server, 9)
    async with asyncio.timeout(TIMEOUT_S):
        while not any("could not start" in str(event.get("failed")) for event in crowded.events):
            await crowded.channel.hello()
    (crowded.run / "trouble").unlink()
    kernel = await crowded.kernel("template")
    assert kernel.started.started_from == "cold"


async def test_a_host_that_leaves_while_it_is_answered(deserted: Guest) -> None:
    """Of a port that is open, one that is not, and one that is waited at: the next request finds all as it was."""
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        await deserted.channel.hello()
        before = descriptors(deserted)
        for _ in range(3):
            for request in ({"op": "forward", "port": port}, {"op": "forward", "port": 1}, {"op": "hello"}):
                left(deserted, **request)
                await deserted.channel.hello()
        async with deserted.channel.forward(port) as (reader, _):
            assert await reader.read() == b""
        await deserted.channel.hello()
    await check_no_more_than(before, deserted)


async def test_a_host_that_leaves_while_somebody_connects(deserted: Guest) -> None:
    """Who connects is refused where nobody else waits, and else has the next one that does."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for others in (False, True):
        leaving = socket.socket(socket.AF_UNIX)
        leaving.connect(str(deserted.run / "init.sock"))
        leaving.sendall(json.dumps({"op": "accept", "port": port}).encode() + b"\n")
        await deserted.channel.hello()
        waiting = asyncio.create_task(echoed(deserted, port)) if others else None
        for _ in range(100 if others else 0):
            await deserted.channel.hello()
        (deserted.run / "trouble").touch()
        if others:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            until_answering(deserted)
            leaving.close()
            writer.write(b"word\n")
            async with asyncio.timeout(TIMEOUT_S):
                assert await reader.readline() == b"word\n"
            writer.close()
            assert waiting is not None
            await waiting
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            until_answering(deserted)
            leaving.close()
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(ConnectionError):
                    if not await reader.read():
                        raise ConnectionResetError
            writer.close()
    await deserted.channel.hello()


async def echoed(guest: Guest, port: int) -> None:
    async with guest.channel.accept(port) as (reader, writer):
        writer.write(await reader.readline())
        await writer.drain()


async def test_a_handler_that_fails_ends_its_connection_alone(places: Places) -> None:
    """Whatever it is: who waits for it is told, and init goes on."""
    change = "from warmcell_guest.supervisor.server import Server\n"
    change += "def broken(*_): raise KeyError('of ours')\nServer._OPERATIONS['signal'] = broken\n"
    async with running_guest(places.root, change=change) as guest:
        with pytest.raises(TransportError):
            await guest.channel.signal(1, 15)
        assert (await guest.channel.exec(["true"])).exit_code == 0
