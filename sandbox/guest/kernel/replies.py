"""Replies that wait while nobody is connected: a router would drop them, and nobody could say what they said."""

from __future__ import annotations

import contextlib
import threading
from typing import Any


class Replies:
    """Makes who answers wait while they are held. That is while the kernel is stopped, nearly all of the time."""

    def __init__(self, session: Any, control_thread: Any) -> None:
        self._free = threading.Event()
        self._free.set()
        self._control = control_thread
        self._send = session.send
        session.send = self._sent

    def hold(self) -> None:
        """From now on an answer waits, but for those of the control thread."""
        self._free.clear()

    def let_go(self) -> None:
        """Somebody is connected to every channel."""
        self._free.set()

    def _sent(self, stream: Any, msg_or_type: Any, *args: Any, **more: Any) -> Any:
        answer = isinstance(msg_or_type, str) and msg_or_type.endswith(("_reply", "input_request"))
        while answer and not self._free.is_set() and threading.current_thread() is not self._control:
            with contextlib.suppress(KeyboardInterrupt):  # What could be interrupted is over.
                self._free.wait()
        return self._send(stream, msg_or_type, *args, **more)
