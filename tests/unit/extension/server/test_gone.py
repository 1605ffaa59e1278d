"""What a server does with a request whose sender goes away in the middle of it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from jupyter_server.auth.identity import IdentityProvider
from tornado import httpserver, netutil, web

from warmcell.extension.server.forward import ForwardHandler


async def test_nothing_waits_for_the_rest_of_a_body_whose_sender_has_gone() -> None:
    """Neither the request to the keeper nor what serves it here is left."""
    asked, given_up = asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def stream(*what: Any, **how: Any) -> AsyncGenerator[None]:
        asked.set()
        try:
            await asyncio.Event().wait()
            yield
        finally:
            given_up.set()

    link = SimpleNamespace(stream=stream)
    settings: dict[str, Any] = {"warmcell_link": link, "identity_provider": IdentityProvider()}
    server = httpserver.HTTPServer(web.Application([(".*", ForwardHandler)], **settings))
    (listener,) = netutil.bind_sockets(0, "127.0.0.1")
    server.add_socket(listener)
    _, writer = await asyncio.open_connection(*listener.getsockname())
    head = "PUT /warmcell/api/v1/sandboxes/x/files HTTP/1.1", "Host: x", "Authorization: Bearer wct_1_x"
    writer.write("\r\n".join((*head, "Content-Length: 10", "", "abc")).encode())
    await asyncio.wait_for(asked.wait(), 60)
    serving = [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "RequestHandler._execute"]
    assert len(serving) == 1
    writer.close()
    await asyncio.wait_for(given_up.wait(), 60)
    done, _ = await asyncio.wait(serving, timeout=20)
    assert done
    server.stop()
    await server.close_all_connections()
