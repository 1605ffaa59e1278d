"""Tools over streamable HTTP, for those who show a token."""

import asyncio
import json
import logging
from typing import Any, Final

import uvicorn
from mcp.server.mcpserver import MCPServer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from warmcell.extension.mcp.callers import Callers
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.errors import UnauthenticatedError, WarmcellError, http_status

log = logging.getLogger(__name__)

PATH: Final = "/mcp"
ASK_HOLDER_S: Final = 300
QUICK_S: Final = 0.5
"""Most requests are over so soon: nobody looks whether their token is."""


class Guarded:
    """Lets nobody to a server whose token the keeper does not know."""

    def __init__(self, application: ASGIApp, callers: Callers) -> None:
        self._application = application
        self._callers = callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI's way)."""
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                calls = await self._callers.of(headers)
                await calls.call("GET", "/principals/self")
            except WarmcellError as error:
                await _refuse(send, error)
                return
            await self._while_known(calls, scope, receive, send)
            return
        await self._application(scope, receive, send)

    async def _while_known(self, calls: Calls, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, until it has ended or the token of its caller has."""
        begun = whole = False

        async def noting(message: Message) -> None:
            nonlocal begun, whole
            begun = begun or message["type"] == "http.response.start"
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        work = asyncio.ensure_future(self._application(scope, receive, noting))
        watch = asyncio.create_task(_until_refused(calls))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
                return
            error = watch.result()
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if whole:
                return
            if begun:
                said = f"event: refused\ndata: {json.dumps(error.to_json())}\n\n"
                await send({"type": "http.response.body", "body": said.encode()})
            else:
                await _refuse(send, error)
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


def application(server: MCPServer[Any], callers: Callers, *, host: str) -> ASGIApp:
    """The server at `/mcp`. Each request stands for itself, so that a restart of it loses nothing."""
    return Guarded(server.streamable_http_app(streamable_http_path=PATH, stateless_http=True, host=host), callers)


async def serve(server: MCPServer[Any], callers: Callers, *, host: str, port: int, announce: bool) -> None:
    """Serve until a signal comes.

    Args:
        server: Whose tools.
        callers: Whose tokens are asked for.
        host: Address to listen on.
        port: 0 is one that is free.
        announce: Print a line of JSON with the URL once it listens.
    """
    config = uvicorn.Config(application(server, callers, host=host), host=host, port=port, log_level="warning")
    serving = uvicorn.Server(config)
    listener = config.bind_socket()
    listener.listen(config.backlog)  # Else whoever reads the URL at once would be refused.
    url = f"http://{host}:{listener.getsockname()[1]}{PATH}"
    print(json.dumps({"url": url}) if announce else f"Serving MCP at {url}", flush=True)  # noqa: T201
    await serving.serve(sockets=[listener])


async def _until_refused(calls: Calls) -> WarmcellError:
    """Wait until a caller's token has ended; why."""
    await asyncio.sleep(QUICK_S)
    while True:
        try:
            await calls.call("GET", "/principals/self", params={"wait": str(ASK_HOLDER_S)}, timeout_s=2 * ASK_HOLDER_S)
        except UnauthenticatedError as error:
            return error
        except WarmcellError:  # Whatever is asked of the keeper hears so by itself.
            await asyncio.sleep(QUICK_S)
        except Exception:  # The work goes on unwatched; what it asks for is looked at by itself.
            log.exception("whether a token is still valid could not be asked")
            await asyncio.sleep(ASK_HOLDER_S)


async def _refuse(send: Send, error: WarmcellError) -> None:
    body = json.dumps(error.to_json()).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": http_status(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
