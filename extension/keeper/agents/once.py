"""Requests that are done once, however often they are sent: a client that has lost an answer asks again."""

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from warmcell.sandbox.errors import BackendUnavailableError, CapacityError, ConflictError, InvalidRequestError

KEPT_S = 600.0
"""How long an answer is remembered."""

KEPT_MAX = 1000
"""Answers for one caller; the oldest is forgotten first."""

PASSING = (CapacityError, BackendUnavailableError)
"""Nothing was made, and whoever is told so asks again, by what is then."""

GIVEN_UP_S = 10.0
"""How long something goes on that nobody waits for any more, where its caller would have to end what comes of it. A
client that has lost its connection is back within two seconds.
"""

KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")


def checked_key(key: str) -> str:
    """A client's key as it is; raises InvalidRequestError where it is none."""
    if not KEY.fullmatch(key):
        raise InvalidRequestError("An Idempotency-Key must be 1 to 255 of A-Z, a-z, 0-9, _ and -", hint="Take a UUID.")
    return key


@dataclass
class _Done:
    fingerprint: bytes
    work: "asyncio.Task[Any]"
    since: float | None = None
    """When it was answered. None: it is under way."""
    waiting: int = 0
    """How many wait for it."""
    deserted: asyncio.TimerHandle | None = None
    """Ends it, unless somebody asks again before."""


class Once:
    """Answers by the key that clients give their requests."""

    def __init__(self) -> None:
        self._known: dict[str, dict[tuple[str, str], _Done]] = {}
        self._given_up: set[asyncio.Task[Any]] = set()

    async def do(
        self,
        whose: str,
        path: str,
        key: str,
        body: bytes,
        work: Callable[[], Awaitable[Any]],
        *,
        given_up_s: float | None = None,
    ) -> Any:
        """What `work` gives, which is called for the first request with this key only.

        It goes on though whoever has asked for it goes away. A failure is an answer too, but for one that says to
        ask again: those who wait for it get it, and the next request is a first one.

        Args:
            whose: Keys of different callers are different ones.
            path: What is asked for.
            key: As the client gives it.
            body: What the request says; with the same key it must be the same.
            work: Does it.
            given_up_s: It is cancelled when nobody has waited for it for so long. None: it goes on to its end.

        Raises:
            InvalidRequestError: That is no key.
            ConflictError: The key was used for another request.
            CapacityError: Too many of that caller's are under way.
        """
        checked_key(key)
        self._forget()
        known = self._known.setdefault(whose, {})
        name, fingerprint = (path, key), hashlib.sha256(body).digest()
        one = known.get(name)
        if one is None:
            self._make_room(known)
            one = known[name] = _Done(fingerprint, asyncio.ensure_future(work()))
            one.work.add_done_callback(lambda done: self._answered(whose, name, one))
        elif one.fingerprint != fingerprint:
            raise ConflictError("This Idempotency-Key was used for another request", hint="Take a new one.")
        if one.deserted is not None:
            one.deserted.cancel()
            one.deserted = None
        one.waiting += 1
        try:
            return await asyncio.shield(one.work)
        finally:
            one.waiting -= 1
            if given_up_s is not None and not one.waiting and not one.work.done():
                loop = asyncio.get_running_loop()
                one.deserted = loop.call_later(given_up_s, self._give_up, whose, name, one)

    async def close(self) -> None:
        """Give up what is under way."""
        work = [*(one.work for known in self._known.values() for one in known.values()), *self._given_up]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    def _give_up(self, whose: str, name: tuple[str, str], one: _Done) -> None:
        """Whoever asks from now on begins anew, also while this one still ends."""
        if not one.work.done():
            del self._known[whose][name]
            self._given_up.add(one.work)
            one.work.cancel()

    def _answered(self, whose: str, name: tuple[str, str], one: _Done) -> None:
        if one.deserted is not None:
            one.deserted.cancel()
        error = None if one.work.cancelled() else one.work.exception()
        if one.work in self._given_up:
            self._given_up.discard(one.work)
        elif one.work.cancelled() or isinstance(error, PASSING):
            del self._known[whose][name]
        else:
            one.since = time.monotonic()

    @staticmethod
    def _make_room(known: dict[tuple[str, str], _Done]) -> None:
        if len(known) < KEPT_MAX:
            return
        answered = [(one.since, name) for name, one in known.items() if one.since is not None]
        if not answered:
            raise CapacityError(
                f"{KEPT_MAX} requests with an Idempotency-Key are under way", hint="Wait until some are answered."
            )
        del known[min(answered)[1]]

    def _forget(self) -> None:
        oldest = time.monotonic() - KEPT_S
        for whose, known in list(self._known.items()):
            for name in [name for name, one in known.items() if one.since is not None and one.since < oldest]:
                del known[name]
            if not known:
                del self._known[whose]
