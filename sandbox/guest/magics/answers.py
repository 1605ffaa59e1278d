"""Waiting for the keeper without a connection to it, as a kernel must that is to be saved meanwhile.

The answer is a file in the run directory, looked for again and again: what wakes the kernel must work also where it is
restored, whose run directory is another one. An inotify watch would be on the old one, a pipe would have no other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

LOST = {
    "ok": False,
    "message": "The keeper's answer cannot be written: the sandbox's run directory /run/warmcell is full",
    "hint": "Remove what was put there, then run the cell again.",
}
LOOK_S = 0.001
LOOK_MAX_S = 0.01


def wait_for_answer(run: str, token: str, *, unless: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """What the keeper says to the question with this token; whole once its line has ended.

    Raises:
        TimeoutError: There was nothing until `unless` said that it is enough.
    """
    answered, lost = (f"{run}/answer-{token}.{kind}" for kind in ("json", "lost"))
    pause = LOOK_S
    while True:
        try:
            with open(answered, "rb") as file:
                said = file.read()
        except (FileNotFoundError, PermissionError):  # The keeper makes it, then gives the right to read it.
            said = b""
        if said.endswith(b"\n"):
            with contextlib.suppress(OSError):
                os.unlink(answered)
            return dict(json.loads(said))
        if os.path.exists(lost):
            for name in (answered, lost):
                with contextlib.suppress(OSError):
                    os.unlink(name)
            return dict(LOST)
        if unless():
            raise TimeoutError("The keeper has not answered")
        time.sleep(pause)
        pause = min(LOOK_MAX_S, 1.05 * pause)
