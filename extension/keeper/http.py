"""HTTP on a Unix socket: the listening end, who is connected, and how errors are answered."""

import asyncio
import contextlib
import json
import logging
import math
import os
import socket
import struct
from collections.abc import Awaitable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from tornado import httputil, iostream, web
from tornado.httpserver import HTTPServer

from warmcell.extension.keeper import gate
from warmcell.extension.keeper.principals import Principal
from warmcell.sandbox.client.keeper import LOOKS
from warmcell.sandbox.errors import (
    InvalidRequestError,
    SandboxNotFoundError,
    UnauthenticatedError,
    WarmcellError,
    http_status,
)

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 16 * 2**20
BACKLOG = 128
CHUNK_BYTES = 2**20
"""How much is read at a time: values come in gigabytes."""

CLOSE_TIMEOUT_S = 5.0

Result = TypeVar("Result")


class UnixServer(HTTPServer):
    """Serves one application on one socket path, mode 0600, and knows how many are connected."""

    def initialize(  # type: ignore[override]
        self,
        application: web.Application,
        path: Path,
        changed: asyncio.Event | None = None,
        max_connections: int | None = None,
    ) -> None:
        """`changed` is set whenever a connection comes or goes; beyond `max_connections` none is taken."""
        super().initialize(application, max_body_size=MAX_JSON_BYTES, chunk_size=CHUNK_BYTES)
        self.path = path
        self.changed = changed or asyncio.Event()
        self._max_connections = max_connections
        self._connected: set[object] = set()
        self._full = False

    @property
    def connected(self) -> int:
        """Open connections of those who need this server: that have made a request, and not only to look."""
        return len(self._connected)

    def listen_unix(self, *, owner: int | None = None) -> None:
        """Bind the socket, given to user `owner` if that is another than ours.

        Somebody else may write in its directory, so nothing is done that would follow a link.

        Raises:
            OSError: Something that is not a file of ours is in the way.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            os.fchmod(listener.fileno(), 0o600)  # the file that `bind` makes takes its mode from here
            listener.bind(str(self.path))
            if owner is not None and owner != os.getuid():
                os.chown(self.path, owner, -1, follow_symlinks=False)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        self.add_socket(listener)

    def handle_stream(self, stream: iostream.IOStream, address: Any) -> None:
        """Somebody connects (tornado's hook)."""
        if self._max_connections is not None and len(self._connections) >= self._max_connections:
            stream.close()
            return
        super().handle_stream(stream, address)

    def start_request(self, server_conn: object, request_conn: httputil.HTTPConnection) -> httputil.HTTPMessageDelegate:
        """A request arrives on a connection (tornado's hook)."""
        if self._full and server_conn not in self._connected:
            server_conn.stream.close()  # type: ignore[attr-defined]
            return httputil.HTTPMessageDelegate()
        return _Arrival(self, server_conn, super().start_request(server_conn, request_conn))

    def need(self, server_conn: object) -> None:
        """Whoever has this connection needs the server for as long as it is open."""
        self._connected.add(server_conn)
        self.changed.set()

    def on_close(self, server_conn: object) -> None:
        """A connection has gone (tornado's hook)."""
        super().on_close(server_conn)
        if server_conn in self._connected:
            self._connected.remove(server_conn)
            self.changed.set()

    def serve_no_others(self) -> None:
        """From now on hang up on who makes their first request: they are to find who comes next."""
        self._full = True

    async def close(self) -> None:
        """Stop listening and drop every connection. The socket's file stays. Idempotent."""
        self.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.close_all_connections()


class _Arrival(httputil.HTTPMessageDelegate):
    """A request on its way to the application: whoever only looks is not one who needs the server."""

    def __init__(self, server: UnixServer, server_conn: object, application: httputil.HTTPMessageDelegate) -> None:
        self._server, self._server_conn, self._application = server, server_conn, application

    def headers_received(
        self, start_line: httputil.RequestStartLine | httputil.ResponseStartLine, headers: httputil.HTTPHeaders
    ) -> Awaitable[None] | None:
        if LOOKS not in headers:
            self._server.need(self._server_conn)
        return self._application.headers_received(start_line, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._application.data_received(chunk)

    def finish(self) -> None:
        self._application.finish()

    def on_connection_close(self) -> None:
        self._application.on_connection_close()


class JsonHandler(web.RequestHandler):
    """JSON in, JSON out, and every `WarmcellError` as its status and wire form."""

    _work: "asyncio.Task[Any] | None" = None
    principal: Principal | None = None
    """For whom it is asked. None: for the user."""
    refused = False
    """Whether the answer, once all has come, is that it may not be."""
    _cut: UnauthenticatedError | None = None
    """Why it was ended in the middle."""

    def prepare(self) -> None:
        """Only this user's processes, by what the kernel says of the peer; and within what a principal may."""
        if self.settings["check_peer"] and self.peer()[1] not in (os.getuid(), 0):
            raise web.HTTPError(403, "this keeper belongs to another user")
        if "gate" not in self.settings:
            return
        try:
            self._pass(self.settings["gate"])
        except WarmcellError as error:
            if not getattr(type(self), "_stream_request_body", False):
                raise
            self._refuse_at_the_end(error)

    @property
    def principal_name(self) -> str | None:
        """Whose it is what this request makes."""
        return None if self.principal is None else self.principal.name

    def _refuse_at_the_end(self, error: WarmcellError) -> None:
        """Once all of a streamed body has come, unread: whoever still sends would not hear the answer."""

        async def ignore(chunk: bytes) -> None:
            pass

        def answer(*arguments: str) -> None:
            raise error

        self.refused = True
        setattr(self, "data_received", ignore)  # noqa: B010 - these methods of this one request
        setattr(self, str(self.request.method).lower(), answer)

    def _pass(self, by: gate.Gate) -> None:
        principal = self.principal = by.who(self.request)
        if by.ends(self.request):
            by.open.add(self, lambda: by.may_go_on(self.request))
        if principal is None:
            return
        method, path = str(self.request.method), self.request.path
        by.check(principal, method, path)
        sandbox_id = gate.below(path, "sandboxes")
        if sandbox_id is not None:
            itself = path.endswith(f"/sandboxes/{sandbox_id}")
            try:
                info = by.sandbox(principal, sandbox_id)
            except SandboxNotFoundError:
                if method == "DELETE" and itself:  # as of one that is gone
                    self.set_status(204)
                    raise web.Finish from None
                raise
            if not itself:
                by.check_awake(principal, info, uses=method == "POST")
            if path.endswith("/fork"):
                by.check_copy(principal, info.gpu)
        if gate.below(path, "snapshots") is not None:
            within = self.get_query_argument("sandbox_id", None)
            self.path_args[0] = by.snapshot(principal, self.path_args[0], within)

    def peer(self) -> tuple[int, int]:
        """Process id and user id of whoever is connected."""
        connection: Any = self.request.connection
        peer: socket.socket | None = connection.stream.socket
        if peer is None:  # it has gone already
            raise web.Finish
        pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return pid, uid

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Await `work`, which is cancelled if the caller goes away: nobody would learn what became of it."""
        task: asyncio.Task[Result] = asyncio.create_task(work)
        self._work = task
        try:
            return await task
        except asyncio.CancelledError:
            if self._cut is not None:
                raise self._cut from None
            if self.gone:
                raise web.Finish from None
            raise

    def no_longer(self, error: UnauthenticatedError) -> None:
        """The right to it has ended, and so does it: what waits is answered so, a stream says so and ends."""
        self._cut = error
        if self._work is not None and not self._work.done():
            self._work.cancel()
        else:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the connection. Idempotent."""
        connection: Any = self.request.connection
        if connection.stream is not None:
            connection.stream.close()

    def settled(self) -> None:
        """It is over: the gate need not look at it any more. Idempotent."""
        if "gate" in self.settings:
            self.settings["gate"].open.discard(self)

    @property
    def gone(self) -> bool:
        """Whether the caller has closed the connection."""
        connection: Any = self.request.connection
        return connection.stream is None or bool(connection.stream.closed())

    def on_finish(self) -> None:
        """The answer is out (tornado's hook)."""
        self.settled()

    def on_connection_close(self) -> None:
        """The caller has gone (tornado's hook)."""
        self.settled()
        super().on_connection_close()  # Which ends the wait for a streamed body.
        if self._work is not None:
            self._work.cancel()

    def body(self) -> dict[str, Any]:
        """The request's JSON object.

        Raises:
            InvalidRequestError: It is none.
        """
        return json_object(self.request.body)

    def answer(self, what: Any, status: int = 200) -> None:
        """Finish with JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(what))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Every failure in the one wire form."""
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        if isinstance(error, WarmcellError):
            self.answer(error.to_json(), http_status(error))
            return
        message = error.log_message if isinstance(error, web.HTTPError) and error.log_message else self._reason
        hint = "keeper.log in the state directory says more." if status_code >= 500 else "See the keeper's API."
        self.answer({"code": "error", "message": message, "hint": hint, "details": {}}, status_code)

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        """Ours are answers, not accidents: one line in the log."""
        if isinstance(value, WarmcellError):
            log.info("%s %s: %s", self.request.method, self.request.path, value)
        else:
            super().log_exception(kind, value, trace)


def json_object(body: bytes) -> dict[str, Any]:
    """A JSON object from bytes; empty bytes are an empty object.

    Raises:
        InvalidRequestError: They are something else.
    """
    if len(body) > MAX_JSON_BYTES:
        raise InvalidRequestError("The request is too large", hint=f"At most {MAX_JSON_BYTES} bytes of JSON.")
    try:
        data = json.loads(body or b"{}", parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The request is not JSON: {error}", hint="Send one JSON object.") from error
    if not isinstance(data, dict):
        raise InvalidRequestError("The request is not a JSON object", hint="Send one JSON object.")
    return data


def _finite(text: str) -> float:
    """A number of JSON; Python's own reader also takes what no other one writes."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number
