"""A nonblocking descriptor with an outgoing buffer: socket, pipe or terminal alike."""

from __future__ import annotations

import _socket
import os

from .loop import CHUNK_BYTES, GONE, READ, WRITE, Loop, tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

HIGH_BYTES = 256 * 1024
"""Past this much unsent data, whoever produces it is no longer read."""

LOW_BYTES = 64 * 1024
"""Below this much, it is read again."""


def ignore(*_: object) -> None:
    """For whom nothing needs to be told."""


class Endpoint:
    """Reads as long as it is not paused; writes what it can at once and the rest when there is room."""

    def __init__(
        self,
        loop: Loop,
        fd: int,
        *,
        on_data: Callable[[bytes], None] | None = None,
        on_end: Callable[[], None] = ignore,
        on_room: Callable[[], None] = ignore,
        duplex: bool = False,
    ) -> None:
        """Take over `fd`.

        Args:
            loop: Where to wait.
            fd: Closed by `close`, or when it ends.
            on_data: Told what was read; without it nothing is read.
            on_end: Told once when the other side is gone, after the last data.
            on_room: Told when the unsent data has shrunk below `LOW_BYTES`.
            duplex: A socket: a paused one still notices that its other side is gone.
        """
        os.set_blocking(fd, False)
        self.fd = fd
        self.on_data = on_data
        self.on_end = on_end
        self.on_room = on_room
        self.closed = False
        self._loop = loop
        self._duplex = duplex
        self._out = bytearray()
        self._paused = on_data is None
        self._finishing = False
        self._crowded = False
        self._halves = False
        self._ended = self._ending = False
        self._update()

    @property
    def crowded(self) -> bool:
        """Whether more than `HIGH_BYTES` wait to be written; `on_room` tells when that is over."""
        return self._crowded

    @property
    def unsent(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._out)

    def pause(self) -> None:
        """Read no more for now."""
        self._paused = True
        self._update()

    def resume(self) -> None:
        """Read again."""
        self._paused = self.on_data is None or self._ended
        self._update()

    def write(self, data: bytes) -> None:
        """Send `data` after what is unsent so far; dropped where the other side is gone."""
        if self.closed:
            return
        if not self._out:
            try:
                sent = os.write(self.fd, data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._end()
                return
            if sent == len(data):
                return
            data = data[sent:]
        self._out += data
        self._crowded = self._crowded or len(self._out) > HIGH_BYTES
        self._update()

    def finish(self) -> None:
        """Close once everything is written; nothing is told any more."""
        self.on_end = self.on_room = ignore
        self.on_data = None
        self._paused = self._finishing = True
        if not self._out:
            self.close()
        else:
            self._update()

    def finish_politely(self) -> None:
        """Of a socket: close once everything is written and the other side has closed too; nothing is told any more.

        Closing while it still sends would cost it what it has not read yet.
        """
        self.on_end = self.on_room = ignore
        self.on_data = ignore
        self.become_half_duplex()
        self.resume()
        self.finish_writing()

    def become_half_duplex(self) -> None:
        """From now on a socket's two directions end one by one; it is closed when both have."""
        self._halves = True
        self._duplex = False

    def finish_writing(self) -> None:
        """End the outgoing direction once everything is written."""
        self._ending = True
        if not self._out and not self.closed:
            self._shut_down()

    def close(self) -> None:
        """Close now. Idempotent; `on_end` is not told."""
        if not self.closed:
            self.closed = True
            self._loop.close(self.fd)

    def hang_up(self) -> None:
        """Close now, as if the other side were gone: `on_end` is told. Idempotent."""
        self._end()

    def detach(self) -> int:
        """Give the descriptor to somebody else."""
        self.closed = True
        self._loop.forget(self.fd)
        return self.fd

    def read_available(self, limit: int) -> bool:
        """Read up to `limit` bytes that are there already; whether the end was reached."""
        taken = 0
        while not self.closed and taken < limit:
            data = self._read()
            if data is None:
                return False
            taken += len(data)
        return self.closed

    def _update(self) -> None:
        if self.closed:
            return
        mask = (0 if self._paused else READ) | (WRITE if self._out else 0)
        if mask or self._duplex:
            self._loop.watch(self.fd, mask, self._on_ready)
        else:
            # A pipe whose writer is gone would report that for ever.
            self._loop.forget(self.fd)

    def _on_ready(self, events: int) -> None:
        try:
            self._read_and_write(events)
        except Exception as error:  # Whoever is behind it waits for something that does not come any more.
            tell(error)
            self.hang_up()

    def _read_and_write(self, events: int) -> None:
        if events & WRITE and self._out:
            self._flush()
        if self.closed:
            return
        if not self._paused:
            if events & (READ | GONE):
                self._read()
        elif events & GONE:
            self._end()

    def _flush(self) -> None:
        try:
            del self._out[: os.write(self.fd, self._out)]
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        if not self._out and self._finishing:
            self.close()
            return
        if not self._out and self._ending:
            self._shut_down()
            return
        if self._crowded and len(self._out) < LOW_BYTES:
            self._crowded = False
            self.on_room()
        self._update()

    def _read(self) -> bytes | None:
        """One read, told to `on_data`; None where nothing was there."""
        try:
            data = os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return None
        except OSError:  # EIO: the last writer of a terminal is gone; ECONNRESET.
            data = b""
        if not data and self._halves:
            self._ended = self._paused = True
            self._update()
            self.on_end()
            if self._ending and not self._out:
                self.close()
        elif not data:
            self._end()
        elif self.on_data is not None:
            self.on_data(data)
        return data

    def _shut_down(self) -> None:
        if self._ended:
            self.close()
            return
        socket = _socket.socket(fileno=self.fd)
        try:
            socket.shutdown(_socket.SHUT_WR)
        except OSError:
            self.close()
        finally:
            socket.detach()
        self._update()

    def _end(self) -> None:
        if not self.closed:
            self.close()
            self.on_end()
