"""Whether a kernel is busy, and since when it is not, as seen from its messages."""

import time
from collections.abc import Set

QUIET = frozenset({"kernel_info_request", "comm_info_request", "history_request", "debug_request"})
"""Requests that a page sends by itself; they are no sign of a user."""


class Activity:
    """Written by the relay's thread alone; others read single attributes, which is atomic."""

    def __init__(self) -> None:
        self.last: float = time.time()
        """Unix time of the last request or output, in seconds."""
        self.executing = False
        """The last `status` that was not about a quiet request said busy."""
        self._open: dict[str, str] = {}

    @property
    def open_requests(self) -> int:
        """Requests that were taken and are not finished."""
        return len(self._open)

    @property
    def busy(self) -> bool:
        """Something runs or waits to run."""
        return self.executing or any(kind not in QUIET for kind in tuple(self._open.values()))

    def asked(self, kind: str, name: str) -> None:
        """A client's request was taken."""
        self._open[name] = kind
        if kind not in QUIET:
            self.last = time.time()

    def answered(self, parent: str) -> None:
        """A reply went back. What a cell prints may still be on its way, so it stays open until idle."""
        if self._open.get(parent) != "execute_request":
            self._open.pop(parent, None)

    def status(self, state: str, parent_kind: str, parent: str) -> None:
        """The kernel published its execution state."""
        if state == "idle":
            self._open.pop(parent, None)
        if parent_kind not in QUIET:
            self.executing = state == "busy"
            self.last = time.time()

    def output(self) -> None:
        """Something else came on iopub."""
        self.last = time.time()

    def forgotten(self, *, waiting: Set[str]) -> None:
        """The kernel is gone, and what it was asked with it; requests that wait for the next one stay open."""
        self._open = {name: kind for name, kind in self._open.items() if name in waiting}
        self.executing = False
