"""REST for the page: the snapshots in the keeper's store. Archives pass through; nothing of them is kept here."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, cast
from urllib.parse import quote

from jupyter_server.auth.decorator import authorized
from tornado import web
from tornado.iostream import StreamClosedError

from warmcell.extension.server.base import WarmcellHandler

ARCHIVE_TYPE = "application/zstd"
IMPORT_MAX_BYTES = 2**40
PIECES_AHEAD = 16
"""Pieces of an archive that wait for the keeper; then the sender waits."""


class SnapshotsHandler(WarmcellHandler):
    """All snapshots, or with `?sandbox_id=` or `?kernel_id=` those of one kernel."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.finish(json.dumps(await self.link.get(f"/snapshots?{self.request.query}")))


class _OneHandler(WarmcellHandler):
    def place(self, ref: str, what: str = "") -> str:
        """The keeper's path of a snapshot."""
        return f"/snapshots/{quote(ref, safe='')}{what}?{self.request.query}"


class SnapshotHandler(_OneHandler):
    """One snapshot, by id, or by name within one kernel."""

    @web.authenticated
    @authorized
    async def get(self, ref: str) -> None:
        self.finish(json.dumps(await self.link.get(self.place(ref))))

    @web.authenticated
    @authorized
    async def patch(self, ref: str) -> None:
        """Give it another name, or none."""
        self.finish(json.dumps(await self.link.do("patch", self.place(ref), self.body())))

    @web.authenticated
    @authorized
    async def delete(self, ref: str) -> None:
        await self.link.do("delete", self.place(ref))
        self.set_status(204)


class VerifyHandler(_OneHandler):
    """Read all of a snapshot and compare its sums."""

    @web.authenticated
    @authorized
    async def post(self, ref: str) -> None:
        self.finish(json.dumps(await self.link.do("post", self.place(ref, "/verify"), self.body())))


class ExportHandler(_OneHandler):
    """A snapshot as one file to be saved. One that breaks off is no archive."""

    @web.authenticated
    @authorized
    async def get(self, ref: str) -> None:
        info = await self.link.get(self.place(ref))
        started = False
        try:
            async with contextlib.aclosing(self.link.download(self.place(ref, "/export"))) as pieces:
                async for piece in pieces:
                    if not started:
                        started = True
                        self.set_header("Content-Type", ARCHIVE_TYPE)
                        self.set_attachment_header(f"{info['name'] or info['id']}.warmcell")
                    self.write(piece)
                    await self.flush()
        except StreamClosedError:  # the reader has gone
            return
        except Exception:
            if not started:
                raise
            connection: Any = self.request.connection
            connection.stream.close()
            return
        self.finish()


@web.stream_request_body
class ImportHandler(WarmcellHandler):
    """A file from an export becomes a snapshot, where the operator allows it; query `name` gives it another name."""

    _sending: "asyncio.Task[Any] | None" = None
    _refused: web.HTTPError | None = None

    async def prepare(self) -> None:  # type: ignore[override] # as jupyter_server's own
        """Nothing of the body is passed on before it is known who sends it."""
        try:
            await super().prepare()
            await cast(Any, self)._allowed()
        except web.HTTPError as error:
            self._refused = error  # for when the body has come: whoever still sends hears no answer
            return
        connection: Any = self.request.connection
        connection.set_max_body_size(IMPORT_MAX_BYTES)
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(PIECES_AHEAD)
        place = f"/snapshots/import?{self.request.query}"
        self._sending = asyncio.create_task(self.link.upload(place, self._body()))

    @web.authenticated
    @authorized
    async def _allowed(self) -> None:
        """Both decorators answer whoever may not."""

    async def data_received(self, chunk: bytes) -> None:
        """A part of the file has come (tornado's hook)."""
        if self._sending is not None:
            await self._pass_on(chunk)

    @web.authenticated
    @authorized
    async def post(self) -> None:
        if self._refused is not None:
            raise self._refused
        assert self._sending is not None
        await self._pass_on(None)
        info = await self._sending
        self.set_status(201)
        self.finish(json.dumps(info))

    def on_finish(self) -> None:
        """The answer is out (tornado's hook)."""
        if self._sending is not None:
            self._sending.cancel()

    def on_connection_close(self) -> None:
        """The sender has gone (tornado's hook)."""
        super().on_connection_close()  # Which ends the wait for the rest of the body.
        self.on_finish()

    async def _pass_on(self, piece: bytes | None) -> None:
        """Give a piece to the keeper, unless that has answered already."""
        assert self._sending is not None
        put = asyncio.ensure_future(self._pieces.put(piece))
        await asyncio.wait({put, self._sending}, return_when=asyncio.FIRST_COMPLETED)
        put.cancel()

    async def _body(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            yield piece
