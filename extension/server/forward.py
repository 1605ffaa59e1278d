"""What agents and programs ask a server goes on to the keeper as it is: method, path, body and answer, piece by piece.

A principal's token is judged by the keeper, and so is a ticket in a URL. Anybody else has to be known to Jupyter, and
asks for the keeper's user.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, cast
from urllib.parse import unquote

from jupyter_server.auth.decorator import authorized
from jupyter_server.auth.identity import User
from jupyter_server.utils import url_path_join
from tornado import httputil, web
from tornado.iostream import StreamClosedError
from tornado.routing import Matcher, Rule

from warmcell.extension.keeper import tickets
from warmcell.extension.keeper.principals import bearer
from warmcell.extension.pace import PATIENCE_S, Pace
from warmcell.extension.server.base import WarmcellHandler
from warmcell.sandbox.errors import NotFoundError, WarmcellError, http_status

PREFIX = "/warmcell/api/v1"
BODY_MAX_BYTES = 2**40
PIECES_AHEAD = 16
"""Pieces of a body that wait for the keeper; then the sender waits."""

PASSED_ON = ("Authorization", "Content-Type", "Idempotency-Key")
PASSED_BACK = ("Content-Type", "Content-Disposition", "Content-Length", "Location", "Retry-After")

BELOW_A_SANDBOX = "commands|runs|contexts|files|ports|run|interrupt|connect|metrics"
"""Nouns and verbs of a sandbox that pages do not use, so that there is no handler for them but this."""


REPEATABLE = re.compile(r"/sandboxes/[a-z0-9]+/(?:snapshot|restore|fork)")
"""What is done once for all requests with one `Idempotency-Key`; pages send none."""


@web.stream_request_body
class ForwardHandler(WarmcellHandler):
    """One request, passed on once. When its sender goes away, so does the keeper's."""

    _refused: Exception | None = None
    _stalled: WarmcellError | None = None
    """Why no more is waited for of what it sends."""
    _work: "asyncio.Task[None] | None" = None

    async def prepare(self) -> None:  # type: ignore[override] # as jupyter_server's own
        """Nothing of a body is passed on before it is known who sends it."""
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(PIECES_AHEAD)
        if self.is_principals:
            self.current_user = self._jupyter_current_user = User(username="a principal of Warmcell")
            self.set_cors_headers()
        else:
            try:
                await super().prepare()
                await cast(Any, self)._allowed()
            except (web.HTTPError, WarmcellError) as error:
                self._refused = error  # for when the body has come: whoever still sends hears no answer
                return
        if ".." in unquote(str(self.request.uri).partition("?")[0]).split("/"):
            self._refused = NotFoundError("There is no such path", hint="See the reference of the REST API.")
            return
        connection: Any = self.request.connection
        connection.set_max_body_size(BODY_MAX_BYTES)
        self._work = asyncio.create_task(self._forward())
        self._work.add_done_callback(lambda done: self._answer_early())

    @property
    def is_principals(self) -> bool:
        """Whether it is asked with a token of Warmcell's own, or by a URL that one has made."""
        return tickets.ARGUMENT in self.request.query_arguments or bearer(self.request.headers) is not None

    @web.authenticated
    @authorized
    async def _allowed(self) -> None:
        """Both decorators answer whoever may not."""

    async def data_received(self, chunk: bytes) -> None:
        """A part of the body has come (tornado's hook)."""
        await self._pass_on(chunk)

    async def get(self, *arguments: str) -> None:
        await self._answer()

    async def post(self, *arguments: str) -> None:
        await self._answer()

    async def put(self, *arguments: str) -> None:
        await self._answer()

    async def patch(self, *arguments: str) -> None:
        await self._answer()

    async def delete(self, *arguments: str) -> None:
        await self._answer()

    def on_connection_close(self) -> None:
        """The sender has gone (tornado's hook)."""
        super().on_connection_close()  # Which ends the wait for the rest of the body.
        if self._work is not None:
            self._work.cancel()

    async def _answer(self) -> None:
        if self._refused is not None:
            raise self._refused
        assert self._work is not None
        await self._pass_on(None)
        try:
            await self._work
        except (StreamClosedError, asyncio.CancelledError):  # the sender has gone
            return
        except WarmcellError:
            if not self._headers_written:
                raise
            connection: Any = self.request.connection
            connection.stream.close()  # so that what was cut short is not taken for whole

    def _answer_early(self) -> None:
        """Who stalls hears so in the middle of what they send, which is read no further."""
        if self._stalled is not None and not self._headers_written:
            self.write_error(http_status(self._stalled), exc_info=(type(self._stalled), self._stalled, None))

    async def _pass_on(self, piece: bytes | None) -> None:
        """Give a piece to the keeper, unless that has answered already."""
        if self._work is None:
            return
        put = asyncio.ensure_future(self._pieces.put(piece))
        await asyncio.wait({put, self._work}, return_when=asyncio.FIRST_COMPLETED)
        put.cancel()

    async def _forward(self) -> None:
        headers = {name: self.request.headers[name] for name in PASSED_ON if name in self.request.headers}
        if not self.is_principals:
            headers.pop("Authorization", None)  # Jupyter's own is nobody else's business
        path = str(self.request.uri).partition(PREFIX)[2]
        if tickets.ARGUMENT in self.request.query_arguments:  # It alone counts then, whoever else might ask.
            headers.pop("Authorization", None)
            shown = self.get_query_arguments(tickets.ARGUMENT)[-1]
            headers[tickets.HEADER] = shown.encode("ascii", "replace").decode()
        content = self._body() if self.request.method in ("POST", "PUT", "PATCH") else None
        asked = self.link.stream(
            str(self.request.method), path, headers=headers, content=content, timeout=None, checked=False
        )
        async with asked as response:
            self.set_status(response.status_code)
            for name in PASSED_BACK:
                if name in response.headers:
                    self.set_header(name, response.headers[name])
            async for piece in response.aiter_raw():
                self.write(piece)
                await self.flush()
        self.finish(set_content_type=response.headers.get("Content-Type", "application/octet-stream"))

    async def _body(self) -> AsyncIterator[bytes]:
        pace = Pace(self.settings.get("warmcell_patience_s", PATIENCE_S))
        while True:
            try:
                async with asyncio.timeout(pace.wait()):
                    piece = await self._pieces.get()
            except TimeoutError:
                self._stalled = pace.stalled()
                raise self._stalled from None
            if piece is None:
                return
            pace.came(len(piece))
            yield piece


class OfPrograms(Matcher):
    """Requests that are not for pages' handlers: with a token or ticket of Warmcell's own, or what may be repeats."""

    def __init__(self, base_url: str) -> None:
        """`base_url` is the server's."""
        self._prefix = url_path_join(base_url, PREFIX)

    def match(self, request: httputil.HTTPServerRequest) -> dict[str, Any] | None:
        """An empty dict where it fits (tornado's way)."""
        begin, path = request.path[: len(self._prefix)], request.path[len(self._prefix) :]
        if begin != self._prefix or not path.startswith("/"):
            return None
        repeats = "Idempotency-Key" in request.headers and REPEATABLE.fullmatch(path)
        signed = tickets.ARGUMENT in request.query_arguments
        return {} if repeats or signed or bearer(request.headers) is not None else None


def keep_out_of_logs(settings: dict[str, Any]) -> None:
    """A URL with a ticket is written to no log of a server with these settings."""
    settings["extra_log_scrub_param_keys"] = [*settings.get("extra_log_scrub_param_keys", []), tickets.ARGUMENT]


def serve_programs(application: web.Application) -> None:
    """Have such requests go to the keeper, before any other handler is looked for."""
    application.add_handlers(".*$", [Rule(OfPrograms(application.settings["base_url"]), ForwardHandler)])


def routes() -> list[tuple[str, type[WarmcellHandler]]]:
    """For those whom Jupyter knows: what pages have no handler for."""
    return [
        (url_path_join(PREFIX, r"/(?:sandboxes|openapi\.json)"), ForwardHandler),
        (url_path_join(PREFIX, rf"/sandboxes/[a-z0-9]+/(?:{BELOW_A_SANDBOX})(?:/.*)?"), ForwardHandler),
        (url_path_join(PREFIX, r"/snapshots/([^/]+)/compress"), ForwardHandler),
    ]
