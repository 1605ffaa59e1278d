"""Whether a kernel is busy, and since when it is not, as seen from its messages; and what it was asked."""

import time
from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import Final

from warmcell.kernel_provisioner.proxy.requests import RequestChannel
from warmcell.kernel_provisioner.proxy.wire import Message

QUIET: Final = frozenset(
    {"kernel_info_request", "comm_info_request", "history_request", "debug_request", "usage_request"}
)
"""Requests that a page sends by itself; they are no sign of a user."""

KEPT_MAX_BYTES: Final = 16 * 1024**2
"""What copies of requests may take that a kernel has and that might have to be put to another state of it."""

EXECUTING_MAX: Final = 1024
"""Requests that a kernel may say it works on at once; it may say anything."""

CELLS_MAX: Final = 2**53
"""Numbers of cells beyond this are none that a page could show."""


@dataclass(slots=True)
class Asked:
    """A client's request that is not finished."""

    kind: str
    channel: RequestChannel = "shell"
    message: Message | None = None
    whole: bool = True
    """The message is as it came; False: its content was not kept."""
    sent: bool = False
    """The kernel has it."""
    begun: bool = False
    """The kernel was heard to work on it."""
    answered: bool = False
    """Its reply has gone back."""


class Activity:
    """Written by the relay's thread alone; others read single attributes, which is atomic."""

    def __init__(self) -> None:
        self.last: float = time.time()
        """Unix time of the last request or output, in seconds."""
        self._executing: set[str] = set()
        """Requests, but for quiet ones, of which the last `status` said busy. Contexts of a kernel work at once."""
        self.cell: int | None = None
        """Number of the last cell that the kernel has begun; None: it has begun none, or that is not known."""
        self._open: dict[str, Asked] = {}
        self._inherited: set[str] = set()
        self._kept_bytes = 0
        self._moved_at = time.monotonic()

    @property
    def open_requests(self) -> int:
        """Requests that were taken and are not finished."""
        return len(self._open)

    @property
    def busy(self) -> bool:
        """Something runs or waits to run."""
        return (
            bool(self._executing)
            or bool(self._inherited)
            or any(each.kind not in QUIET for each in tuple(self._open.values()))
        )

    @property
    def idle_s(self) -> float:
        """Seconds since there was an open request or output; 0 while there is one."""
        return 0.0 if self.busy else max(0.0, time.monotonic() - self._moved_at)

    def asked(self, kind: str, name: str, channel: RequestChannel = "shell", message: Message | None = None) -> None:
        """A client's request was taken."""
        self._open[name] = Asked(kind, channel, message)
        if kind not in QUIET:
            self._moved()

    def sent(self, name: str) -> None:
        """The kernel was given a request. A small one is kept, as it may have to be put again."""
        found = self._open.get(name)
        if found is None:
            return
        found.sent = True
        if found.message is None:
            return
        if found.channel == "shell" and self._kept_bytes + found.message.size_bytes <= KEPT_MAX_BYTES:
            self._kept_bytes += found.message.size_bytes
        else:
            found.message = Message(found.message.route, b"", found.message.header, b"{}", b"{}", b"{}", [])
            found.whole = False

    def answered(self, parent: str) -> None:
        """A reply went back. What a cell prints may still be on its way, so it stays open until idle."""
        found = self._open.get(parent)
        if found is None:
            return
        if found.kind == "execute_request":
            found.answered = True
        else:
            self._close(parent)

    def status(self, state: object, parent_kind: str, parent: str) -> None:
        """The kernel published its execution state, whatever it says that is."""
        if state == "idle":
            self._close(parent)
            self._inherited.discard(parent)
        elif (found := self._open.get(parent)) is not None:
            found.begun = True
        if parent_kind in QUIET:
            return
        if state != "busy":
            self._executing.discard(parent)
        elif len(self._executing) < EXECUTING_MAX:
            self._executing.add(parent)
        self._moved()

    def output(self) -> None:
        """Something else came on iopub."""
        self._moved()

    def began(self, cell: object) -> None:
        """The kernel has begun a cell of this number, as it says."""
        if isinstance(cell, int) and 0 <= cell < CELLS_MAX:
            self.cell = int(cell)

    def went_on(self) -> None:
        """The kernel is back; its idleness begins anew."""
        self._moved_at = time.monotonic()

    def inherited(self, names: Collection[str]) -> None:
        """The kernel that comes is in the middle of these requests, which nobody here has asked for."""
        self._inherited = set(names) - self._open.keys()

    def knows(self, name: str) -> bool:
        """Whether a client waits for the end of this request."""
        return name in self._open

    def in_kernel(self) -> tuple[str, ...]:
        """The msg_ids of what the kernel has and has not finished, the oldest first."""
        return (*self._inherited, *(name for name, each in self._open.items() if each.sent))

    def unanswered(self) -> dict[str, Asked]:
        """What the kernel has and has not answered."""
        return {name: each for name, each in self._open.items() if each.sent and not each.answered}

    def give_up(self) -> list[tuple[str, Asked]]:
        """The kernel's present state is given up: what it has and has not finished, the oldest first."""
        found = [(name, each) for name, each in self._open.items() if each.sent]
        for name, _ in found:
            self._close(name)
        self._inherited.clear()
        self._executing.clear()
        self.cell = None
        self._moved()
        return found

    def asked_again(self, name: str, asked: Asked) -> None:
        """What the kernel had, and has not begun, waits again, before all else."""
        asked.sent = asked.begun = False
        self._open = {name: asked, **self._open}

    def finished(self, name: str) -> None:
        """A request was answered in the kernel's place."""
        self._close(name)

    def forgotten(self, *, waiting: Set[str]) -> None:
        """The kernel is gone, and what it was asked with it; requests that wait for the next one stay open."""
        for name in self._open.keys() - waiting:
            self._close(name)
        self._inherited.clear()
        self._executing.clear()
        self.cell = None

    def _close(self, name: str) -> None:
        found = self._open.pop(name, None)
        if found is not None and found.sent and found.whole and found.message is not None:
            self._kept_bytes -= found.message.size_bytes

    def _moved(self) -> None:
        self.last = time.time()
        self._moved_at = time.monotonic()
