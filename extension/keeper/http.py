"""HTTP on a Unix socket: the listening end, who is connected, and how errors are answered."""

import asyncio
import json
import logging
import os
import socket
import struct
from pathlib import Path
from typing import Any

from tornado import httputil, web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_unix_socket

from warmcell.sandbox.errors import InvalidRequestError, WarmcellError, http_status

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 16 * 2**20
MAX_BODY_BYTES = 64 * 2**30
"""Values sent to a remote cell are streamed to a file, so this only says that there is an end."""


class UnixServer(HTTPServer):
    """Serves one application on one socket path, mode 0600, and knows how many are connected."""

    def initialize(self, application: web.Application, path: Path, changed: asyncio.Event | None = None) -> None:  # type: ignore[override]
        """`changed` is set whenever a connection comes or goes."""
        super().initialize(application, max_body_size=MAX_BODY_BYTES)
        self.path = path
        self.changed = changed or asyncio.Event()
        self._connected: set[object] = set()

    @property
    def connected(self) -> int:
        """Open connections that have made a request."""
        return len(self._connected)

    def listen_unix(self, *, owner: int | None = None) -> None:
        """Bind the socket, given to user `owner` if that is another than ours."""
        self.path.unlink(missing_ok=True)
        listener = bind_unix_socket(str(self.path), mode=0o600)
        if owner is not None and owner != os.getuid():
            os.chown(self.path, owner, -1, follow_symlinks=False)
        self.add_socket(listener)

    def start_request(self, server_conn: object, request_conn: httputil.HTTPConnection) -> httputil.HTTPMessageDelegate:
        """A request arrives on a connection (tornado's hook)."""
        self._connected.add(server_conn)
        self.changed.set()
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        """A connection has gone (tornado's hook)."""
        super().on_close(server_conn)
        self._connected.discard(server_conn)
        self.changed.set()

    async def close(self) -> None:
        """Stop listening, drop every connection, remove the socket. Idempotent."""
        self.stop()
        self.path.unlink(missing_ok=True)
        await self.close_all_connections()


class JsonHandler(web.RequestHandler):
    """JSON in, JSON out, and every `WarmcellError` as its status and wire form."""

    def prepare(self) -> None:
        """Only this user's processes, by what the kernel says of the peer."""
        if self.settings["check_peer"] and self.peer()[1] not in (os.getuid(), 0):
            raise web.HTTPError(403, "this keeper belongs to another user")

    def peer(self) -> tuple[int, int]:
        """Process id and user id of whoever is connected."""
        connection: Any = self.request.connection
        raw = connection.stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, _ = struct.unpack("3i", raw)
        return pid, uid

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
        self.answer({"code": "error", "message": message, "hint": "", "details": {}}, status_code)

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
        data = json.loads(body or b"{}")
    except ValueError as error:
        raise InvalidRequestError(f"The request is not JSON: {error}", hint="Send one JSON object.") from error
    if not isinstance(data, dict):
        raise InvalidRequestError("The request is not a JSON object", hint="Send one JSON object.")
    return data
