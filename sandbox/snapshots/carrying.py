"""Images of the `criu` engine taken out of the helper, brought in, verified and compressed: its `ImagePort`."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from warmcell.sandbox.errors import ProtocolError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.criu import CriuEngine, Talk, deadline, follow

PIECE_TIMEOUT_S = 600.0
"""For one piece; and for putting a whole image on the disk once all pieces are there."""
VERIFY_TIMEOUT_S = 3600.0
PIECE_MAX_BYTES = 1 << 20


class CriuImages:
    """Implements `ImagePort`."""

    def __init__(self, engine: CriuEngine) -> None:
        self._engine = engine

    async def export_image(self, image: SnapshotId) -> AsyncGenerator[bytes, None]:
        """See the port."""
        async with self._engine.talk({"op": "export", "image": image}) as talk:
            async with deadline("export", PIECE_TIMEOUT_S):
                await talk.answer()
            while (piece := await _next(talk)) is not None:
                yield piece

    async def import_image(self, image: SnapshotId, data: AsyncIterator[bytes]) -> int:
        """See the port."""
        request = {"op": "import", "image": image, "store": self._engine.store}
        async with self._engine.talk(request) as talk:
            answer = asyncio.create_task(talk.answer())
            try:
                async for piece in data:
                    for at in range(0, len(piece), PIECE_MAX_BYTES):
                        await _send(talk, piece[at : at + PIECE_MAX_BYTES], unless=answer)
                    if answer.done():  # It is refused, before all of it is there.
                        break
                else:
                    await _send(talk, b"", unless=answer)
                async with deadline("import", PIECE_TIMEOUT_S):
                    return int((await answer)["image_bytes"])
            finally:
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)

    async def compress_image(self, image: SnapshotId, told: Callable[[int, int], None]) -> None:
        """See the port."""
        async with self._engine.talk({"op": "compress", "image": image}) as talk:
            await follow(talk, "compress", told, timeout_s=PIECE_TIMEOUT_S)

    async def verify_image(self, image: SnapshotId) -> bool:
        """See the port."""
        async with deadline("verify", VERIFY_TIMEOUT_S), self._engine.talk({"op": "verify", "image": image}) as talk:
            return bool((await talk.answer())["unknown"] == 0)


async def _next(talk: Talk) -> bytes | None:
    """The next piece that the helper sends; None after the last."""
    async with deadline("export", PIECE_TIMEOUT_S):
        said = await talk.said()
        if "bytes" not in said or said.get("ok") is not None:
            talk.check(said)
            return None
        try:
            return await talk.reader.readexactly(int(said["bytes"]))
        except asyncio.IncompleteReadError as error:
            raise ProtocolError("The helper broke off in the middle of an image", hint="Try again.") from error


async def _send(talk: Talk, piece: bytes, *, unless: "asyncio.Task[object]") -> None:
    """Send a piece, as long as the helper has not answered."""
    talk.writer.write(json.dumps({"bytes": len(piece)}).encode() + b"\n" + piece)
    drained = asyncio.create_task(_drained(talk.writer.drain()))
    async with deadline("import", PIECE_TIMEOUT_S):
        try:
            await asyncio.wait({drained, unless}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drained.cancel()


async def _drained(drain: Awaitable[None]) -> None:
    with contextlib.suppress(ConnectionError):  # Then there is an answer that says why.
        await drain
