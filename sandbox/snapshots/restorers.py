"""Processes of the helper that restore clones, each of one image, kept for a moment after their last one.

What such a process needs for every clone of an image, it has done once: it is there, and it has checked the image.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.helper.clones import AT_ONCE
from warmcell.sandbox.models import SnapshotId

KEPT_S = 0.5
"""A fork's clones, and the starts of a page that is opened with several notebooks, follow each other faster."""
LAST_WORDS_BYTES = 1 << 16


@dataclass(eq=False, slots=True)
class Restorer:
    """One process, by the connection to it."""

    connection: socket.socket
    under_way: int = 0
    leaving: asyncio.TimerHandle | None = None

    def last_words(self) -> bytes:
        """What it has said of itself as it ended: why it could serve none of its clones."""
        with contextlib.suppress(OSError):
            return self.connection.recv(LAST_WORDS_BYTES, socket.MSG_PEEK)
        return b""


class Restorers:
    """Those of one keeper. On one loop."""

    def __init__(self, connect: Callable[[], Awaitable[socket.socket]]) -> None:
        """`connect` gives a connection to a helper, not blocking."""
        self._connect = connect
        self._kept: dict[SnapshotId, list[Restorer]] = {}
        self._asking = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def asked(self, image: SnapshotId, pidfd: int) -> AsyncIterator[tuple[socket.socket, Restorer]]:
        """Have a clone restored; a socket on which that is answered, which the caller closes, and who answers.

        Args:
            image: What it is a clone of.
            pidfd: Of its sandbox's first process.

        Raises:
            WarmcellError: No helper can be reached.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                async with self._asking:  # Two that begin at once are clones of one process.
                    restorer = await self._hand_over(image, [pidfd, theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        try:
            yield ours, restorer
        finally:
            restorer.under_way -= 1
            if restorer.under_way == 0:
                restorer.leaving = asyncio.get_running_loop().call_later(KEPT_S, self._let_go, image, restorer)

    def close(self, image: SnapshotId | None = None) -> None:
        """Hang up on those that restore this image, or on all; clones under way come all the same."""
        for one in [image] if image is not None else list(self._kept):
            for restorer in list(self._kept.get(one, ())):
                self._let_go(one, restorer)

    async def _hand_over(self, image: SnapshotId, fds: list[int]) -> Restorer:
        request = json.dumps({"op": "restore", "image": image}).encode() + b"\n"
        for kept in list(self._kept.get(image, ())):
            if kept.under_way < AT_ONCE:
                try:
                    socket.send_fds(kept.connection, [request], fds)
                except OSError:  # It has ended.
                    self._let_go(image, kept)
                    continue
                kept.under_way += 1
                if kept.leaving is not None:
                    kept.leaving.cancel()
                return kept
        restorer = Restorer(await self._connect(), under_way=1)
        try:
            socket.send_fds(restorer.connection, [request], fds)
        except OSError as error:
            restorer.connection.close()
            raise TransportError(f"The helper does not listen ({error.strerror})", hint="Try again.") from error
        self._kept.setdefault(image, []).append(restorer)
        return restorer

    def _let_go(self, image: SnapshotId, restorer: Restorer) -> None:
        kept = self._kept.get(image, [])
        if restorer in kept:
            kept.remove(restorer)
            if not kept:
                del self._kept[image]
        if restorer.leaving is not None:
            restorer.leaving.cancel()
        restorer.connection.close()
