"""`POST /sandboxes/{id}/run`: one cell, its values streamed in and out, its output as it comes."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tornado import web
from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.http import MAX_JSON_BYTES, JsonHandler, json_object, log
from warmcell.extension.keeper.rank_steps import Request
from warmcell.extension.keeper.ranks import RANKS_MAX, Rank
from warmcell.extension.keeper.runs import Runs
from warmcell.sandbox import guest_files
from warmcell.sandbox.errors import (
    CapacityError,
    InvalidRequestError,
    OperationTimeoutError,
    ProtocolError,
    WarmcellError,
)
from warmcell.sandbox.models import SandboxId

PIECE_BYTES = 2**20
INLINE_BYTES = 64 * 1024
"""What is sent is no file of its own up to this."""

MAX_BODY_BYTES = 64 * 2**30
"""Values are streamed to a file in the sandbox, whose size is the real limit."""

FORM = (
    'Send a line of JSON, {"code": "…", "rank": 0, "ranks": 1, "send": 0, "load": {…}, "get": ["x"], "last": "", '
    '"timeout_s": 60}, then `send` bytes.'
)


@dataclass(frozen=True, slots=True)
class Cell:
    """What is asked for, checked."""

    request: Request
    rank: Rank
    send_bytes: int
    timeout_s: float | None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Cell":
        """Read the first line of a request.

        Raises:
            InvalidRequestError: Something in it is not of its form.
        """
        code, send, get = data.get("code"), data.get("send") or 0, data.get("get") or []
        timeout = data.get("timeout_s")
        if not isinstance(code, str):
            raise InvalidRequestError("A run needs `code`", hint=FORM)
        if isinstance(send, bool) or not isinstance(send, int) or send < 0:
            raise InvalidRequestError(f"`send` is a number of bytes, not {send!r}", hint=FORM)
        rank, ranks, load, last = data.get("rank", 0), data.get("ranks", 1), data.get("load"), data.get("last", "")
        if not _is_count(ranks, RANKS_MAX + 1) or not ranks or not _is_count(rank, ranks):
            raise InvalidRequestError(f"`rank` and `ranks` are {rank!r} and {ranks!r}", hint=FORM)
        if (load is not None and not isinstance(load, dict)) or (send and load is None):
            raise InvalidRequestError("`load` says what the bytes are", hint=FORM)
        if not isinstance(last, str) or (last and not last.isidentifier()):
            raise InvalidRequestError("`last` is a name", hint=FORM)
        if not isinstance(get, list) or not all(isinstance(name, str) and name.isidentifier() for name in get):
            raise InvalidRequestError("`get` is a list of names of variables", hint=FORM)
        if timeout is not None and not _is_time(timeout):
            raise InvalidRequestError(f"`timeout_s` is a number of seconds, not {timeout!r}", hint=FORM)
        return cls(Request(code, load, tuple(get), last), Rank(rank, ranks), send, timeout)


@web.stream_request_body
class RunHandler(JsonHandler):
    """The body is a line of JSON and then the raw values, which go to a file as they arrive."""

    def initialize(self) -> None:
        """Nothing has come yet (tornado's hook)."""
        self._head = bytearray()
        self._cell: Cell | None = None
        self._refused: WarmcellError | None = None
        self._send: Path | None = None
        self._file: BinaryIO | None = None
        self._inline = bytearray()
        self._received = 0
        self._gone = False
        self._streaming: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """Before the body is read."""
        super().prepare()
        if self.refused:
            return
        connection: Any = self.request.connection
        connection.set_max_body_size(MAX_BODY_BYTES)
        self._sandbox_id = SandboxId(self.path_args[0])
        scope = self.settings["scope"]
        try:
            info = self.settings["keeper"].service.info(self._sandbox_id)
            if scope is not None:
                scope.check_visible(info)
        except WarmcellError as error:
            self._refused = error

    async def data_received(self, chunk: bytes) -> None:
        """Bytes of the request (tornado's hook); reading waits until they are on disk.

        What is wrong with them is answered once all have been read: an answer in between would not be heard.
        """
        if self._refused is not None:
            return
        try:
            await self._take(chunk)
        except WarmcellError as error:
            self._refused = error
        except OSError as error:
            self._refused = CapacityError(
                f"The values do not fit into the sandbox: {error.strerror}", hint="Send less, or through a shared file."
            )

    async def post(self, sandbox_id: str) -> None:
        """Run it, and stream what comes of it."""
        try:
            cell = await self._all_received()
            self.set_header("Content-Type", "application/x-ndjson")
            runs: Runs = self.settings["keeper"].runs
            connection: Any = self.request.connection
            runs.lead(connection.stream)
            await self._run(cell)
            if not self._gone and not runs.follow(self._sandbox_id, connection.stream):
                await self.finish()
                connection.stream.close()
        except StreamClosedError:  # the caller has gone; the cell was interrupted
            pass
        finally:
            self._clean()

    def on_connection_close(self) -> None:
        """The caller has gone (tornado's hook)."""
        super().on_connection_close()
        self._gone = True
        if self._streaming is not None:
            self._streaming.cancel()
        self._clean()

    async def _take(self, chunk: bytes) -> None:
        if self._cell is None:
            self._head += chunk
            end = self._head.find(b"\n")
            if end < 0 and len(self._head) <= MAX_JSON_BYTES:
                return
            if end < 0:
                raise InvalidRequestError("The request has no first line", hint=FORM)
            chunk = bytes(self._head[end + 1 :])
            self._cell = Cell.from_json(json_object(bytes(self._head[:end])))
            if self._cell.send_bytes > INLINE_BYTES:
                self._send = self.settings["keeper"].runs.new_file(self._sandbox_id, "send")
                self._file = guest_files.create(self._send)
        self._received += len(chunk)
        if self._received > self._cell.send_bytes:
            raise InvalidRequestError("There are more bytes than `send` says", hint=FORM)
        if self._file is None:
            self._inline += chunk
        elif chunk:
            with contextlib.suppress(ValueError):  # closed meanwhile: the caller has gone
                await asyncio.to_thread(self._file.write, chunk)

    async def _all_received(self) -> Cell:
        if self._refused is None and self._cell is None:
            self._cell = Cell.from_json(json_object(bytes(self._head)))
        if self._refused is not None:
            raise self._refused
        assert self._cell is not None
        if self._received < self._cell.send_bytes:
            raise InvalidRequestError("There are fewer bytes than `send` says", hint=FORM)
        if self._file is not None:
            try:
                await asyncio.to_thread(self._file.close)
            except OSError as error:
                raise CapacityError(
                    f"The values do not fit into the sandbox: {error.strerror}", hint="Send less at a time."
                ) from error
        return self._cell

    async def _run(self, cell: Cell) -> None:
        """Stream the cell's output; nobody to read it ends it."""
        if self._gone:
            return
        values: Path = self.settings["keeper"].runs.new_file(self._sandbox_id, "get")
        self._streaming = asyncio.create_task(self._stream(cell, values))
        try:
            await self._streaming
        except asyncio.CancelledError:
            if not self._gone:
                raise
        finally:
            await asyncio.gather(self._streaming, return_exceptions=True)
            self.settings["keeper"].runs.returned(self._sandbox_id, values)

    async def _stream(self, cell: Cell, values: Path) -> None:
        runs: Runs = self.settings["keeper"].runs
        request = cell.request
        if self._send is not None:
            request = dataclasses.replace(
                request, load={**(request.load or {}), "stream": [self._send.name, 0, cell.send_bytes]}
            )
        elif self._inline:
            inline = base64.b64encode(self._inline).decode()
            request = dataclasses.replace(request, load={**(request.load or {}), "inline": inline})
        try:
            async with asyncio.timeout(cell.timeout_s):
                messages = runs.run(self._sandbox_id, request, rank=cell.rank, values=values)
                async with contextlib.aclosing(messages):
                    async for message in messages:
                        if message.get("done"):
                            await self._finish_with(message, values)
                        else:
                            await self._line(message)
        except StreamClosedError:
            raise
        except Exception as error:
            await self._line({"done": True, "status": "failed", "failure": _failure(error, cell).to_json(), "get": 0})

    async def _finish_with(self, done: dict[str, Any], values: Path) -> None:
        """The last line, and the values behind it."""
        result = guest_files.open_existing(values)
        if result is None:
            self.write(json.dumps({**done, "get": 0}) + "\n")  # It goes out with the end of the answer.
            return
        with result:
            left = os.fstat(result.fileno()).st_size
            await self._line({**done, "get": left})
            while left:
                piece = await asyncio.to_thread(result.read, min(PIECE_BYTES, left))
                if not piece:  # the guest has cut it short, so what was promised cannot be kept
                    connection: Any = self.request.connection
                    connection.stream.close()
                    raise StreamClosedError
                left -= len(piece)
                self.write(piece)
                await self.flush()

    async def _line(self, message: dict[str, Any]) -> None:
        self.write(json.dumps(message, default=str) + "\n")
        await self.flush()

    def _clean(self) -> None:
        """The file of values that came is gone. Idempotent."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it still held does not fit
                self._file.close()
        if self._send is not None:
            _unlink(self._send)


def _is_count(value: object, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _failure(error: Exception, cell: Cell) -> WarmcellError:
    if isinstance(error, WarmcellError):
        return error
    if isinstance(error, TimeoutError):
        return OperationTimeoutError(
            f"The remote cell did not end within {cell.timeout_s:g} s and was interrupted",
            hint="Give it more time, or less to do.",
            details={"operation": "run", "timeout": cell.timeout_s},
        )
    log.info("a remote kernel broke the protocol", exc_info=error)
    return ProtocolError(
        f"The remote kernel said something that is no message ({type(error).__name__})", hint="Run the cell again."
    )


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # whatever the guest has put there stays in its sandbox
        path.unlink()
