"""Web ports below a path of the server: `/warmcell/ports/<port>-<sandbox>/<ticket>/…`.

The ticket is in the path, so that no cookie is needed: the pages have an origin that is nobody's, from which browsers
send none.
"""

import asyncio
import re
from typing import Any, cast

from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.httputil import HTTPHeaders
from tornado.iostream import StreamClosedError

from warmcell.extension.keeper import tickets
from warmcell.extension.keeper.agents.urls_api import PORTS
from warmcell.extension.server.base import WarmcellHandler
from warmcell.extension.server.e2b.body import Body
from warmcell.extension.server.ports.headers import SANDBOXED, Place
from warmcell.extension.server.ports.passing import PortClosedError, pass_on
from warmcell.sandbox.errors import TransportError, WarmcellError, http_status

UPLOAD_MAX_BYTES = 2**40
PATH = re.compile(rf"(.*?{PORTS})/([0-9]{{1,5}})-([a-z0-9]{{1,32}})/([A-Za-z0-9_.-]+)(/.*)?")
"""The first one counts: what comes after it is the port's own business, whatever that looks like."""


class PassingHandler(WarmcellHandler):
    """A handler whose answers may be somebody else's, with their own headers."""

    body_stream: Body

    def forget_headers(self) -> None:
        """None of the server's own is on what comes from a port."""
        self._headers = HTTPHeaders()

    def finish_plainly(self) -> None:
        """The answer is out, with the headers that it had."""
        self.finish(set_content_type=self._headers.get("Content-Type", ""))


@web.stream_request_body
class PortsHandler(PassingHandler):
    """All methods of all paths below one port."""

    _work: "asyncio.Task[None] | None" = None

    def initialize(self) -> None:
        """Nothing has come yet (tornado's hook)."""
        self.body_stream = Body()

    async def prepare(self) -> None:  # type: ignore[override] # as jupyter_server's own
        """Begin while the body still comes."""
        cast(Any, self.request.connection).set_max_body_size(UPLOAD_MAX_BYTES)
        self._work = asyncio.create_task(self._serve())

    async def data_received(self, chunk: bytes) -> None:
        """A part of the body has come (tornado's hook)."""
        await self.body_stream.put(chunk)

    @allow_unauthenticated
    async def post(self, *_: str) -> None:
        """Whoever asks shows a ticket, which the keeper looks at."""
        assert self._work is not None
        await self.body_stream.put(None)
        try:
            await self._work
        except (asyncio.CancelledError, StreamClosedError):
            return  # the client has gone

    get = put = patch = delete = head = post

    @allow_unauthenticated
    async def options(self, *_: str) -> None:  # type: ignore[override] # tornado awaits it
        """Pages of such a port ask before they send JSON to it, since their origin is nobody's."""
        if "Access-Control-Request-Method" in self.request.headers:
            assert self._work is not None
            self._work.cancel()
            self.forget_headers()
            self.set_status(204)
            for name, value in (("Origin", "*"), ("Methods", "*"), ("Headers", "*"), ("Max-Age", "600")):
                self.set_header(
                    f"Access-Control-Allow-{name}" if name != "Max-Age" else f"Access-Control-{name}", value
                )
            self.finish_plainly()
            return
        await self.post()

    def check_xsrf_cookie(self) -> None:
        """No cookie counts here, so none can be abused."""

    def on_connection_close(self) -> None:
        """The client has gone (tornado's hook)."""
        super().on_connection_close()
        if self._work is not None:
            self._work.cancel()

    def on_finish(self) -> None:
        """The answer is out (tornado's hook)."""
        self.body_stream.drop()

    async def _serve(self) -> None:
        if self.request.method == "OPTIONS" and "Access-Control-Request-Method" in self.request.headers:
            return
        path, mark, query = str(self.request.uri).partition("?")
        match = PATH.fullmatch(path)
        assert match is not None
        before, port, sandbox_id, ticket, below = match.groups()
        if below is None:  # relative links of the page need the end of its folder
            await self.body_stream.drain()
            self.redirect(f"{path}/{mark}{query}")
            return
        self.request.uri = f"{before}/{port}-{sandbox_id}/[secret]{below}{mark}{query}"  # as it is logged
        place = Place(
            port=int(port),
            scheme=str(self.request.protocol),
            host=self.request.host,
            prefix=f"{before}/{port}-{sandbox_id}/{ticket}",
        )
        try:
            await pass_on(
                self,
                place,
                sandbox_id,
                below + mark + query,
                proof={tickets.HEADER: ticket},
                secrets=(str(self.identity_provider.token),),
            )
        except WarmcellError as error:
            await tell_failure(self, error)
        finally:
            self.body_stream.drop()


async def tell_failure(handler: PassingHandler, error: WarmcellError) -> None:
    """Say why there is no page; where half of one is out, only a broken connection says that."""
    handler.log.info("port %s: %s", handler.request.path.rpartition("/")[0][:64], error)
    await handler.body_stream.drain()
    connection: Any = handler.request.connection
    if handler._headers_written:
        if connection.stream is not None:
            connection.stream.close()
        return
    absent = isinstance(error, (PortClosedError, TransportError))
    handler.set_status(502 if absent else http_status(error))
    handler.set_header("Content-Security-Policy", SANDBOXED)
    handler.finish(f"{error.message}\n{error.hint}\n", set_content_type="text/plain; charset=utf-8")


def routes() -> list[tuple[str, type[WarmcellHandler]]]:
    """Of both kinds of server."""
    return [(url_path_join(PORTS, r"[0-9]{1,5}-[a-z0-9]{1,32}/[A-Za-z0-9_.-]+(?:/.*)?"), PortsHandler)]
