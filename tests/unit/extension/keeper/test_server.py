"""The keeper's listening end: who comes when it is about to end is to find the next keeper."""

import asyncio
from pathlib import Path

import httpx
import pytest
from tornado import web

from tests.leaks import Places
from warmcell.extension.keeper.http import JsonHandler, UnixServer
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths


class Hello(web.RequestHandler):
    def get(self) -> None:
        self.write("hello")


class Status(web.RequestHandler):
    def get(self) -> None:
        self.write({})


def client_of(path: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://keeper", timeout=60)


async def test_a_server_that_is_to_end_serves_no_others(tmp_path: Path) -> None:
    """Whoever was served before still is; a new client is hung up on, rather than told that all is well."""
    path = tmp_path / "s"
    server = UnixServer(web.Application([("/", Hello)]), path)
    server.listen_unix()
    async with client_of(path) as known, client_of(path) as new:
        assert (await known.get("/")).text == "hello"
        server.serve_no_others()
        with pytest.raises(httpx.TransportError):
            await new.get("/")
        assert (await known.get("/")).text == "hello"
        assert server.connected == 1
    await server.close()


async def test_a_server_does_not_stay_for_those_who_only_look(places: Places) -> None:
    """Whoever asks for its figures every few seconds, or finds out whether it listens, does not keep it from idling."""
    paths, changed = Paths(places.runtime, places.state, places.leases).make(), asyncio.Event()
    server = UnixServer(web.Application([("/warmcell/api/v1/status", Status)]), paths.keeper_socket, changed)
    server.listen_unix()
    async with await KeeperClient.connect(paths=paths, start=False, looks=True) as looking:
        assert (server.connected, changed.is_set()) == (0, False)
        async with await KeeperClient.connect(paths=paths, start=False) as needing:
            assert (server.connected, changed.is_set()) == (1, True)
            await needing.get("/status")
        await looking.get("/status")
    await server.close()
    assert server.connected == 0
    paths.keeper_socket.unlink()


@web.stream_request_body
class Takes(JsonHandler):
    """Is sent something, bit by bit."""

    async def data_received(self, chunk: bytes) -> None:
        self.settings["began"].set()

    async def put(self) -> None:
        self.answer({})


async def test_nothing_waits_for_the_rest_of_a_body_whose_sender_has_gone(tmp_path: Path) -> None:
    """What serves the request ends with it, rather than when the collector of garbage comes by."""
    path, began = tmp_path / "s", asyncio.Event()
    server = UnixServer(web.Application([("/", Takes)], check_peer=False, began=began), path)
    server.listen_unix()
    _, writer = await asyncio.open_unix_connection(path)
    writer.write(b"PUT / HTTP/1.1\r\nHost: keeper\r\nContent-Length: 10\r\n\r\nabc")
    await asyncio.wait_for(began.wait(), 60)
    serving = [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "RequestHandler._execute"]
    assert len(serving) == 1
    writer.close()
    done, _ = await asyncio.wait(serving, timeout=20)
    assert done
    await server.close()
