"""Requests that are done once, however often they are sent: a client that has lost an answer asks again."""

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from warmcell.sandbox.errors import CapacityError, ConflictError, InvalidRequestError

KEPT_S = 600.0
KEPT_MAX = 10_000
KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")


@dataclass
class _Done:
    fingerprint: bytes
    work: "asyncio.Task[Any]"
    since: float


class Once:
    """Answers by the key that clients give their requests."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], _Done] = {}

    async def do(self, whose: str, path: str, key: str, body: bytes, work: Callable[[], Awaitable[Any]]) -> Any:
        """What `work` gives, which is called for the first request with this key only.

        It goes on to its end, whoever has asked for it goes away. A failure is an answer too.

        Args:
            whose: Keys of different callers are different ones.
            path: What is asked for.
            key: As the client gives it.
            body: What the request says; with the same key it must be the same.
            work: Does it.

        Raises:
            InvalidRequestError: That is no key.
            ConflictError: The key was used for another request.
            CapacityError: Too many are remembered.
        """
        if not KEY.fullmatch(key):
            raise InvalidRequestError(
                "An Idempotency-Key must be 1 to 255 of A-Z, a-z, 0-9, _ and -", hint="Take a UUID."
            )
        self._forget()
        name, fingerprint = (whose, path, key), hashlib.sha256(body).digest()
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= KEPT_MAX:
                raise CapacityError("Too many requests have an Idempotency-Key", hint="Try again in some minutes.")
            task = asyncio.ensure_future(work())
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
            known = self._known[name] = _Done(fingerprint, task, time.monotonic())
        elif known.fingerprint != fingerprint:
            raise ConflictError("This Idempotency-Key was used for another request", hint="Take a new one.")
        return await asyncio.shield(known.work)

    async def close(self) -> None:
        """Give up what is under way."""
        work = [one.work for one in self._known.values()]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def _forget(self) -> None:
        oldest = time.monotonic() - KEPT_S
        for name in [name for name, one in self._known.items() if one.since < oldest and one.work.done()]:
            del self._known[name]
