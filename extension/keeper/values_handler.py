"""`/sandboxes/{id}/values/{number}`: what is large in a fan-out, once for all its ranks, which map it.

Whoever sends gets a descriptor of the file and writes it, where that is no way past a cap on its memory; the pages are
its own as long as the sandbox has them. Else gigabytes come through the connection, so they are read past tornado's own
buffers, and written while more is read.
"""

import asyncio
import contextlib
import http.client
import json
import socket
from pathlib import Path
from typing import Any, BinaryIO

from tornado import web
from tornado.iostream import IOStream, StreamClosedError

from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.run_handler import MAX_BODY_BYTES
from warmcell.sandbox import guest_files
from warmcell.sandbox.errors import (
    CapacityError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedOperationError,
    WarmcellError,
    http_status,
)
from warmcell.sandbox.models import SandboxId

PIECE_BYTES = 2 * 2**20

SIZE = "Warmcell-Bytes"
"""Header of whoever wants a descriptor: how much will be written."""

HANDED_OVER = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
"""It comes with the descriptor."""


@web.stream_request_body
class ValuesHandler(JsonHandler):
    """A file of the sandbox's run directory."""

    async def prepare(self) -> None:  # type: ignore[override]
        """Before the body is read; one that is wanted is taken here, and answered."""
        super().prepare()
        connection: Any = self.request.connection
        connection.set_max_body_size(MAX_BODY_BYTES)  # One that is too large is read to its end, too.
        if self.refused:
            return
        sandbox_id, number = SandboxId(self.path_args[0]), self.path_args[1]
        keeper, scope = self.settings["keeper"], self.settings["scope"]
        try:
            info = keeper.service.info(sandbox_id)
            if scope is not None:
                scope.check_visible(info)
            self._path: Path = keeper.runs.file(sandbox_id, f"values-{number}")
            if self.request.method != "PUT":
                return
            size = self._checked_size("Content-Length")
            file = guest_files.create(self._path)
        except WarmcellError as error:
            self._refuse_at_the_end(error)
            return
        self._finished = True  # All that is still to be said goes past tornado.
        await self._take(connection.detach(), file, size)

    async def post(self, sandbox_id: str, number: str) -> None:
        """A descriptor to write with; nothing stays unless a byte says that all was written."""
        self._check_uncapped()
        self._checked_size(SIZE)
        await self._hand_over(guest_files.create(self._path), new=True)

    async def get(self, sandbox_id: str, number: str) -> None:
        """A descriptor to read with what was written."""
        self._check_uncapped()
        file = guest_files.open_existing(self._path)
        if file is None:
            raise NotFoundError(f"There are no values {number}", hint="Put them again.")
        await self._hand_over(file, new=False)

    async def data_received(self, chunk: bytes) -> None:
        """Of a body that nobody wants (tornado's hook)."""

    def delete(self, sandbox_id: str, number: str) -> None:
        """Whoever has mapped it keeps it."""
        _unlink(self._path)
        self.set_status(204)

    def _checked_size(self, header: str) -> int:
        """How many bytes it says are to come.

        Raises:
            InvalidRequestError: It does not.
            CapacityError: More than may be.
        """
        size, most = _size(self.request.headers.get(header, "")), self.settings["keeper"].runs.values_bytes
        if size > most:
            raise CapacityError(
                f"These values have {size / 2**30:.1f} GiB; at most {most / 2**30:.1f} GiB may be sent",
                hint="Read them in the remote cell, or raise c.Warmcell.remote_values.",
            )
        return size

    def _check_uncapped(self) -> None:
        """Pages belong to whoever writes them first, and stay for as long as a descriptor does: a sandbox with a cap
        would come to its end by what it sends. Who acts for a principal is elsewhere.

        Raises:
            UnsupportedOperationError: A descriptor is not for whoever asks.
        """
        scope = self.settings["scope"]
        if self.principal is not None or (scope is not None and scope.spec.limits.memory_bytes is not None):
            raise UnsupportedOperationError("No descriptor is handed over here", hint="PUT the values.")

    async def _hand_over(self, file: BinaryIO, *, new: bool) -> None:
        connection: Any = self.request.connection
        stream: IOStream = connection.detach()
        self._finished = True  # All that is still to be said goes past tornado.
        kept = not new
        try:
            socket.send_fds(stream.socket, [HANDED_OVER], [file.fileno()])
            if new:
                kept = bool(await stream.read_bytes(1))
        except (OSError, StreamClosedError):  # The caller has gone.
            pass
        finally:
            stream.close()
            file.close()
            if not kept:
                _unlink(self._path)

    async def _take(self, stream: IOStream, file: BinaryIO, size: int) -> None:
        """Read all of it and say how that went; whoever leaves before the end leaves nothing."""
        whole = False
        try:
            failed = await _copied(stream, file, size)
            whole = failed is None
            await stream.write(_answer(failed))
        except StreamClosedError:  # the caller has gone
            pass
        finally:
            stream.close()
            with contextlib.suppress(OSError):
                file.close()
            if not whole:
                _unlink(self._path)


async def _copied(stream: IOStream, file: BinaryIO, size: int) -> WarmcellError | None:
    """From the connection into the file, a piece being written while the next is read; why that failed.

    All is read even then: whoever still sends would not hear the answer.
    """
    pieces = [memoryview(bytearray(min(PIECE_BYTES, size))) for _ in range(2)]
    writing: asyncio.Task[None] | None = None
    failed: OSError | None = None
    left, turn = size, 0
    try:
        while left:
            piece = pieces[turn][: min(left, PIECE_BYTES)]
            await stream.read_into(piece)  # type: ignore[arg-type]
            left, turn = left - len(piece), 1 - turn
            failed = failed or await _ended(writing)
            writing = None if failed else asyncio.create_task(asyncio.to_thread(_write, file, piece))
        failed = failed or await _ended(writing)
    finally:
        await _ended(writing)
    if failed is None:
        return None
    return CapacityError(f"The values do not fit into the sandbox: {failed.strerror}", hint="Send less at a time.")


async def _ended(writing: asyncio.Task[None] | None) -> OSError | None:
    try:
        if writing is not None:
            await writing
    except OSError as error:
        return error
    return None


def _write(file: BinaryIO, piece: memoryview) -> None:
    file.write(piece)
    file.flush()


def _answer(failed: WarmcellError | None) -> bytes:
    status = 204 if failed is None else http_status(failed)
    body = b"" if failed is None else json.dumps(failed.to_json()).encode()
    head = [f"HTTP/1.1 {status} {http.client.responses[status]}", "Connection: close", "Content-Type: application/json"]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode() + body


def _size(told: str) -> int:
    if not (told.isascii() and told.isdigit()):
        raise InvalidRequestError("Values come with a Content-Length", hint="Say how many bytes will be sent.")
    return int(told)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # whatever the guest has put there stays in its sandbox
        path.unlink()
