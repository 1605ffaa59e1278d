"""What goes wrong in init's own doing ends one request, and neither init nor what it has started."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.process.guest import TIMEOUT_S, TREE
from tests.leaks import Places
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import SandboxStartError, WarmcellError

INIT = """
import os, sys, time
run, tree, what = sys.argv[1:]
sys.path.insert(0, tree)
from supervisor import endpoint, server

count, fork, write = 0, os.fork, endpoint.Endpoint.write

def fails():
    global count
    count += 1
    if os.path.exists("no-forks"):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

def late(self, data):
    if b'"ok"' in data and os.path.exists("late"):
        time.sleep(0.3)
    return write(self, data)

if what == "fork":
    os.fork = fails
else:
    endpoint.Endpoint.write = late
server.Server(run, tree, sys.executable).run()
"""
PORT = 47_914


@contextlib.asynccontextmanager
async def init(places: Places, what: str) -> AsyncIterator[tuple[Path, asyncio.subprocess.Process, GuestChannel]]:
    """Its run directory, its process and a channel to one that something happens to."""
    run = places.root / "g"
    run.mkdir(mode=0o700)
    environment = {**os.environ, "HOME": str(places.root)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INIT, str(run), str(TREE), what, env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    channel = await GuestChannel.open(run)
    try:
        yield run, process, channel
        assert process.returncode is None
    finally:
        await channel.close()
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(TIMEOUT_S):
            assert await process.wait() == 0


def descriptors(process: asyncio.subprocess.Process) -> int:
    """How many it has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


async def test_where_there_can_be_no_more_processes_only_that_fails(places: Places) -> None:
    """A command, one with a terminal, a kernel, a template: each is refused with the reason; then they work."""
    async with init(places, "fork") as (run, process, channel):
        assert (await channel.exec(["sh", "-c", "exit 3"])).exit_code == 3
        before = descriptors(process)
        (run / "no-forks").touch()
        for _ in range(3):
            with pytest.raises(WarmcellError, match="temporarily unavailable"):
                await channel.exec(["true"])
            with pytest.raises(WarmcellError, match="temporarily unavailable"):
                async with channel.exec_stream(["true"], pty=(3, 4)):
                    pass
            with pytest.raises(SandboxStartError, match="temporarily unavailable"):
                await channel.start_kernel(str(run / "k.json"), env={}, engine="cold")
            await channel.prepare([], name="t")
        (run / "no-forks").unlink()
        assert (await channel.exec(["sh", "-c", "exit 4"])).exit_code == 4
        blocked = next(
            line.split()[1] for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigBlk" in line
        )
        assert int(blocked, 16) & (1 << (signal.SIGCHLD - 1)) == 0
        deadline = time.monotonic() + TIMEOUT_S
        while descriptors(process) > before:
            assert time.monotonic() < deadline, (before, descriptors(process))
            await asyncio.sleep(0.05)


def asked(run: Path, **request: object) -> socket.socket:
    """A request of a host that says no more."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(run / "init.sock"))
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


async def test_a_host_that_goes_as_it_is_answered_ends_only_its_request(places: Places) -> None:
    """A port that is closed, one that is open, and one on which it waited: the next one who asks is served."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there = listening.getsockname()[1]
        async with init(places, "late") as (run, _, channel):
            (run / "late").touch()
            for port in (1, there):
                asked(run, op="forward", port=port).close()
            waits = asked(run, op="accept", port=PORT)
            await channel.hello()
            with socket.create_connection(("127.0.0.1", PORT)) as inside:
                await asyncio.sleep(0.1)  # Init is about to tell it.
                waits.close()
                (run / "late").unlink()
                await channel.hello()
                inside.settimeout(TIMEOUT_S)
                assert await asyncio.to_thread(inside.recv, 1) == b""
            async with channel.forward(there) as (_, writer):
                writer.write(b"through")
                said = b""
                while not said:  # What was given up before has ended.
                    served, _ = await asyncio.to_thread(listening.accept)
                    with served:
                        served.settimeout(TIMEOUT_S)
                        said = await asyncio.to_thread(served.recv, 7)
                assert said == b"through"
            again = asyncio.create_task(_accepted(channel))
            while True:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", PORT)) as one:
                    one.sendall(b"x")
                    assert await again == b"x"
                    break
                await asyncio.sleep(0.05)


async def _accepted(channel: GuestChannel) -> bytes:
    async with channel.accept(PORT) as (reader, _):
        return await reader.readexactly(1)
