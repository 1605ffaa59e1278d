"""The clients' own way over a Unix socket: where nobody listens, and where somebody goes in the wrong moment."""

import asyncio
import contextlib
import gc
import os
import socket
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.leaks import Places
from warmcell.sandbox.client._api import unreachable
from warmcell.sandbox.client._unix import AsyncUnixTransport
from warmcell.sandbox.client.keeper import SyncKeeperClient
from warmcell.sandbox.errors import BackendUnavailableError, TransportError
from warmcell.sandbox.paths import Paths


def test_a_connection_that_is_refused_leaves_no_socket_open(places: Places) -> None:
    """The keeper goes just as somebody asks: one error, and no descriptor."""
    paths = Paths(places.runtime, places.state, places.leases)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(paths.keeper_socket))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with SyncKeeperClient(paths) as client, pytest.raises(TransportError, match="refused") as raised:
            client.get("/status")
        gc.collect()
    paths.keeper_socket.unlink()
    assert raised.value.hint
    assert [str(one.message) for one in caught if one.category is ResourceWarning] == []


def test_a_directory_that_is_not_absolute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper and its clients would each take it for another."""
    monkeypatch.setenv("WARMCELL_RUNTIME_DIR", "here")
    with pytest.raises(BackendUnavailableError, match="WARMCELL_RUNTIME_DIR") as raised:
        Paths.default()
    assert "slash" in raised.value.hint


def test_a_connection_that_broke_is_said_in_words() -> None:
    """Such an error has no text of its own."""
    assert unreachable(httpx.ReadError("")).message == "The keeper cannot be reached (the connection broke)"
    assert "(refused)" in unreachable(httpx.ConnectError("refused")).message


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
PATIENCE_S = 60


@contextlib.asynccontextmanager
async def talking(path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, "asyncio.Queue[asyncio.StreamWriter]"]]:
    """A client, and the other end of each of its requests: of one that keeps the connection, again and again."""
    asked: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                asked.put_nowait(writer)

    server = await asyncio.start_unix_server(serve, path)
    async with httpx.AsyncClient(
        transport=AsyncUnixTransport(str(path)), base_url="http://x", timeout=PATIENCE_S
    ) as http:
        yield http, asked
    server.close()
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_an_answer_in_the_moment_of_giving_up_is_no_accident(tmp_path: Path) -> None:
    """Whoever is cancelled just as the answer comes is cancelled, and nothing goes wrong in the loop."""
    accidents: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: accidents.append(context))
    async with talking(tmp_path / "s") as (http, asked):
        for _ in range(5):
            task = asyncio.create_task(http.get("/"))
            other = await asyncio.wait_for(asked.get(), PATIENCE_S)
            for _ in range(20):  # Until it waits for nothing but that.
                await asyncio.sleep(0)
            os.write(other.get_extra_info("socket").fileno(), ANSWER)
            loop.call_soon(task.cancel)
            with pytest.raises(asyncio.CancelledError):
                await task
    assert accidents == []


async def test_a_connection_that_was_hung_up_is_not_used_again(tmp_path: Path) -> None:
    """A kept one is, as long as it is there; whether it is, is known though the loop has not heard of it yet."""
    async with talking(tmp_path / "s") as (http, asked):

        async def get() -> asyncio.StreamWriter:
            task = asyncio.create_task(http.get("/"))
            other = await asyncio.wait_for(asked.get(), PATIENCE_S)
            other.write(ANSWER)
            assert (await task).text == "hi"
            return other

        first = await get()
        assert await get() is first
        first.get_extra_info("socket")._sock.shutdown(socket.SHUT_RDWR)
        assert await get() is not first


async def test_what_goes_wrong_on_the_way_has_its_name(tmp_path: Path) -> None:
    """No answer in time, a connection that breaks, nobody who listens."""
    async with talking(tmp_path / "s") as (http, asked):
        with pytest.raises(httpx.ReadTimeout):
            await http.get("/", timeout=0.01)
        task = asyncio.create_task(http.get("/"))
        await asyncio.wait_for(asked.get(), PATIENCE_S)
        (await asyncio.wait_for(asked.get(), PATIENCE_S)).transport.abort()
        with pytest.raises(httpx.RemoteProtocolError):
            await task
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(transport=AsyncUnixTransport(str(tmp_path / "none"))) as http:
            await http.get("http://x/")
