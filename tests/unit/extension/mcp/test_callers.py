"""Whom tools are asked for: many tokens over one connection, and none shown for another."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from tornado import httpserver, netutil, web

from warmcell.extension.mcp.callers import Callers
from warmcell.sandbox.client.transport import API, Where
from warmcell.sandbox.errors import UnauthenticatedError

PATIENCE_S = 60


class Who(web.RequestHandler):
    """Says who asks; `/slow` when it is let go on."""

    async def get(self, name: str) -> None:
        if name == "slow":
            self.settings["began"].set()
            await self.settings["go_on"].wait()
        self.write({"who": self.request.headers.get("Authorization", "")})


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, web.Application]]:
    """Its URL, and its application."""
    application = web.Application([(rf"{API}/(\w+)", Who)], began=asyncio.Event(), go_on=asyncio.Event())
    listening = httpserver.HTTPServer(application)
    sockets = netutil.bind_sockets(0, "127.0.0.1")
    listening.add_sockets(sockets)
    yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}", application
    listening.stop()
    await listening.close_all_connections()


async def test_many_who_come_break_off_nobody(server: tuple[str, web.Application]) -> None:
    """Whoever waits for an answer gets it, however many others, known or not, have asked meanwhile; each as itself."""
    url, application = server
    callers = Callers(Where(url, "the user's", None), each=True)

    async def ask(token: str, what: str) -> str:
        calls = await callers.of({"authorization": f"Bearer {token}"})
        return str((await calls.call("GET", f"/{what}"))["who"])

    slow = asyncio.create_task(ask("wct_first", "slow"))
    await asyncio.wait_for(application.settings["began"].wait(), PATIENCE_S)
    for number in range(100):
        assert await ask(f"wct_{number}", "fast") == f"Bearer wct_{number}"
    application.settings["go_on"].set()
    assert await asyncio.wait_for(slow, PATIENCE_S) == "Bearer wct_first"
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "Basic wct_x"}):
        with pytest.raises(UnauthenticatedError):
            await callers.of(headers)
    await callers.close()


async def test_over_stdio_all_is_asked_for_one(server: tuple[str, web.Application]) -> None:
    """Whoever runs the server, whatever a request says."""
    callers = Callers(Where(server[0], "wct_mine", None))
    calls = await callers.of({"authorization": "Bearer wct_other"})
    assert (await calls.call("GET", "/fast"))["who"] == "Bearer wct_mine"
    await callers.close()
