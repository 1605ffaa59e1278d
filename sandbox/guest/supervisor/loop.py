"""One epoll loop: descriptors, ended children and the request to terminate.

Nothing that goes wrong in it ends it: with init the whole sandbox would end, kernels, commands and all.
"""

from __future__ import annotations

import _signal
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ = select.EPOLLIN | select.EPOLLRDHUP
WRITE = select.EPOLLOUT
GONE = select.EPOLLHUP | select.EPOLLERR

CHUNK_BYTES = 64 * 1024
"""The most that one read takes, so that no stream starves another."""


class Loop:
    """Calls back for descriptors that are ready and for children that have ended."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._closing: list[int] = []
        self._children: dict[int, Callable[[int], None]] = {}
        self._stopping = False
        self._pause_s: float | None = None
        self._look: Callable[[], None] = lambda: None
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake = wake
        _signal.set_wakeup_fd(woken)
        for number in (_signal.SIGCHLD, _signal.SIGTERM):
            _signal.signal(number, lambda *_: None)
        for number in (_signal.SIGINT, _signal.SIGHUP):
            _signal.signal(number, _signal.SIG_IGN)
        self.watch(wake, READ, self._on_signal)

    def watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` whenever `fd` is ready for `mask`; again for the same `fd` to change it."""
        if fd in self._handlers:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watch `fd` no longer."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self, fd: int) -> None:
        """Forget and close `fd`, but only after this round, so that its number is not reused within it."""
        self.forget(fd)
        self._closing.append(fd)

    def adopt(self, pid: int, on_exit: Callable[[int], None]) -> None:
        """Call `on_exit(exit_code)` once when child `pid` has ended; 128 + n stands for signal n."""
        self._children[pid] = on_exit

    def disown(self, pid: int) -> None:
        """Somebody else has reaped `pid`."""
        self._children.pop(pid, None)

    def look(self, pause_s: float | None, what: Callable[[], None] = lambda: None) -> None:
        """Call `what` after each round, which lasts that long at most; never again with None."""
        self._pause_s = pause_s
        self._look = what

    def run(self, *, first_within_s: float) -> None:
        """Serve until SIGTERM, or until nothing at all has happened for that long at the beginning."""
        patience_s: float | None = first_within_s
        while not self._stopping:
            ready = self._epoll.poll(patience_s if self._pause_s is None else self._pause_s)
            if not ready and patience_s is not None:
                return
            patience_s = None
            for fd, events in ready:
                handler = self._handlers.get(fd)
                if handler is not None:
                    _guarded(handler, events)
            for fd in self._closing:
                os.close(fd)
            self._closing.clear()
            _guarded(self._look)

    def _on_signal(self, events: int) -> None:
        if _signal.SIGTERM in os.read(self._wake, CHUNK_BYTES):
            self._stopping = True
        self.reap()

    def reap(self) -> None:
        """Collect every child that has ended, orphans included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            on_exit = self._children.pop(pid, None)
            if on_exit is not None:
                _guarded(on_exit, exit_code(status))


def _guarded(handler: Callable[..., None], *arguments: int) -> None:
    try:
        handler(*arguments)
    except Exception as error:
        tell(error)


def tell(error: BaseException) -> None:
    """Say on stderr what went wrong, if anybody reads that."""
    try:
        os.write(2, f"warmcell: {type(error).__name__}: {error}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        return


def exit_code(status: int) -> int:
    """A wait status as a shell says it."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
