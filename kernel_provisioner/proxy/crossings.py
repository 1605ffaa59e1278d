"""Requests that a kernel had while it was paused, whose replies may have gone nowhere.

A kernel's router drops a reply for a peer that is not connected. Output is kept in the guest, so the idle status of
such a request comes in any case; if no reply comes with it, it was lost.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from warmcell.kernel_provisioner.proxy.activity import Asked
from warmcell.kernel_provisioner.proxy.link import GuestChannelName
from warmcell.kernel_provisioner.proxy.wire import Message

GRACE_S: Final = 0.5
"""A reply is sent before the idle status, on another channel; it is lost if it has not come so long after."""


@dataclass(slots=True)
class _Crossing:
    asked: Asked
    said: dict[str, Any] = field(default_factory=dict)
    """What the reply says, as far as output tells it."""
    due: float = 0.0
    """When its reply is lost; 0: it is not idle yet."""


class Crossings:
    """Watches for lost replies and makes up for them. Called in the relay's thread."""

    def __init__(self, lost: Callable[[str, Asked, Mapping[str, Any]], None]) -> None:
        """`lost` is called with msg_id, request, and what the reply would have said."""
        self._lost = lost
        self._all: dict[str, _Crossing] = {}

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, requests: Mapping[str, Asked], *, last_input: Message | None) -> None:
        """The kernel goes on, and has these requests, none of which it has answered."""
        for name, asked in requests.items():
            self._all.setdefault(name, _Crossing(asked))
        if requests and last_input is not None:
            self.saw("iopub", last_input)

    def clear(self) -> None:
        """The kernel is another one."""
        self._all.clear()

    def saw(self, channel: GuestChannelName, message: Message) -> None:
        """Something came from the kernel."""
        parent = message.read_parent()[1]
        found = self._all.get(parent)
        if found is None:
            return
        if channel in ("shell", "control"):
            del self._all[parent]
        elif channel == "iopub" and message.mentions("status"):
            if message.read_content().get("execution_state") == "idle":
                found.due = time.monotonic() + GRACE_S
        elif channel == "iopub" and message.mentions("execute_input"):
            found.said["execution_count"] = message.read_content().get("execution_count")
        elif channel == "iopub" and message.mentions("error"):
            found.said |= {**message.read_content(), "status": "error"}

    def timeout_s(self) -> float | None:
        """How long to wait at most before `care` is to be called."""
        due = [each.due for each in self._all.values() if each.due]
        return max(0.001, min(due) - time.monotonic()) if due else None

    def care(self) -> None:
        """Make up for what was lost."""
        now = time.monotonic()
        for name, each in tuple(self._all.items()):
            if each.due and each.due <= now:
                del self._all[name]
                self._lost(name, each.asked, each.said)
