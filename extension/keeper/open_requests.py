"""Requests that are under way for somebody who may lose the right to them: streams may be open for days.

What opens a request is looked at when it begins, and again every second for as long as it lasts.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

from warmcell.sandbox.errors import UnauthenticatedError

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""How soon what is under way ends when the token has."""


class Cut(Protocol):
    """A handler of a request."""

    def no_longer(self, error: UnauthenticatedError) -> None: ...


class OpenRequests:
    """All of one keeper but the user's own, which nothing ends."""

    def __init__(self, *, look_s: float = LOOK_S) -> None:
        """There are none."""
        self._look_s = look_s
        self._open: dict[Cut, Callable[[], object]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, request: Cut, check: Callable[[], object]) -> None:
        """One has begun; `check` raises UnauthenticatedError when it may go on no longer."""
        self._open[request] = check
        self._arm()

    def discard(self, request: Cut) -> None:
        """It has ended. Idempotent."""
        self._open.pop(request, None)
        if not self._open and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _look(self) -> None:
        self._timer = None
        for request, check in list(self._open.items()):
            try:
                check()
            except UnauthenticatedError as error:
                self._end(request, error)
            except Exception:  # It is looked at again; the others are looked at in any case.
                log.exception("a request whose token could not be looked at goes on")
        if self._open:
            self._arm()

    def _end(self, request: Cut, error: UnauthenticatedError) -> None:
        self._open.pop(request, None)
        try:
            request.no_longer(error)
        except Exception:  # One that cannot be ended must not keep the others.
            log.exception("a request whose token is not valid any more could not be ended")
