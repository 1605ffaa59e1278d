"""`POST /sandboxes/{id}/run`: one cell, its values streamed in and out, its output as it comes."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from tornado import web
from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.http import MAX_JSON_BYTES, JsonHandler, json_object
from warmcell.sandbox import guest_files
from warmcell.sandbox.errors import InvalidRequestError, WarmcellError
from warmcell.sandbox.models import SandboxId

PIECE_BYTES = 2**20


@web.stream_request_body
class RunHandler(JsonHandler):
    """The body is a line of JSON and then the raw values, which go to a file as they arrive."""

    def prepare(self) -> None:
        super().prepare()
        self._head = bytearray()
        self._request: dict[str, Any] | None = None
        self._send: Path | None = None
        self._sandbox_id = SandboxId(self.path_args[0])
        info = self.settings["keeper"].service.info(self._sandbox_id)
        scope = self.settings["scope"]
        if scope is not None:
            scope.check_visible(info)
        self._gone = asyncio.Event()

    async def data_received(self, chunk: bytes) -> None:
        """Bytes of the request (tornado's hook); reading waits until they are on disk."""
        if self._request is None:
            self._head += chunk
            end = self._head.find(b"\n")
            if end < 0:
                if len(self._head) > MAX_JSON_BYTES:
                    raise InvalidRequestError("The request has no first line", hint="Start it with a line of JSON.")
                return
            self._request = json_object(bytes(self._head[:end]))
            chunk = bytes(self._head[end + 1 :])
            if self._request.get("send"):
                self._send = self.settings["keeper"].runs.new_file(self._sandbox_id, "send")
                self._send_file = await asyncio.to_thread(guest_files.create, self._send)
        if chunk and self._send is not None:
            await asyncio.to_thread(self._send_file.write, chunk)

    async def post(self, sandbox_id: str) -> None:
        """Run it, and stream what comes of it."""
        request = self._request if self._request is not None else json_object(bytes(self._head))
        code, get = request.get("code"), request.get("get") or []
        if not isinstance(code, str) or not all(isinstance(name, str) and name.isidentifier() for name in get):
            raise InvalidRequestError(
                "A run needs `code` and, in `get`, names of variables", hint='Send {"code": "…", "get": ["x"]}.'
            )
        if self._send is not None:
            self._send_file.close()
        runs = self.settings["keeper"].runs
        values: Path = runs.new_file(self._sandbox_id, "get")
        self.set_header("Content-Type", "application/x-ndjson")
        work = asyncio.create_task(self._stream(runs, code, get, values))
        gone = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                await runs.interrupt(self._sandbox_id)
            await work
        except StreamClosedError:  # the caller has gone; the cell was interrupted
            pass
        finally:
            gone.cancel()
            for file in (self._send, values):
                if file is not None:
                    file.unlink(missing_ok=True)

    def on_connection_close(self) -> None:
        """The caller has gone (tornado's hook)."""
        self._gone.set()

    async def _stream(self, runs: Any, code: str, get: list[str], values: Path) -> None:
        result: BinaryIO | None = None
        try:
            async for message in runs.run(self._sandbox_id, code, send=self._send, get=get, values=values):
                if message.get("done"):
                    result = guest_files.open_existing(values)
                    message["get"] = os.fstat(result.fileno()).st_size if result is not None else 0
                self._line(message)
                if not self._gone.is_set():
                    await self.flush()
        except WarmcellError as error:
            self._line({"done": True, "status": "failed", "failure": error.to_json(), "get": 0})
            return
        if result is not None:
            with result:
                while piece := await asyncio.to_thread(result.read, PIECE_BYTES):
                    self.write(piece)
                    await self.flush()

    def _line(self, message: dict[str, Any]) -> None:
        if not self._gone.is_set():
            self.write(json.dumps(message, default=str) + "\n")
