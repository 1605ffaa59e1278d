"""The keeper's listening end: who comes when it is about to end is to find the next keeper."""

from pathlib import Path

import httpx
import pytest
from tornado import web

from warmcell.extension.keeper.http import UnixServer


class Hello(web.RequestHandler):
    def get(self) -> None:
        self.write("hello")


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
