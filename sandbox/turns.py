"""Starts take turns: two at once for each processor, those of notebooks apart from all others.

A start is work for several processes. A hundred that begin together take a hundred times as long each, so that none is
there before the last; so most of them wait here, in an order that can be seen, and their time-outs begin afterwards.
"""

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

AT_ONCE = 2 * len(os.sched_getaffinity(0))
"""Its steps wait for each other, so that one for each processor would leave them idle; more would all be late."""

LONGEST_S = 10.0
"""Whoever takes longer waits for something else than processors, such as an engine: then the next may begin."""

TELL_EVERY_S = 1.0
"""So often at most is somebody who waits told of another place."""


@dataclass(eq=False, slots=True)
class _Waiting:
    whose: str
    urgent: Callable[[], bool]
    told: Callable[[int], None]
    admitted: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    place: int = -1
    told_at: float = 0.0


class Turns:
    """Who may work now, and who is next. On one loop."""

    def __init__(self, at_once: int = AT_ONCE, *, longest_s: float = LONGEST_S) -> None:
        self._at_once = self._free = at_once
        self._longest_s = longest_s
        self._waiting: list[_Waiting] = []
        """In the order in which they came."""
        self._served: dict[str, int] = {}
        """When each of those was admitted last, as a number."""
        self._admissions = 0

    @contextlib.asynccontextmanager
    async def turn(
        self,
        whose: str,
        *,
        urgent: Callable[[], bool] = lambda: True,
        told: Callable[[int], None] = lambda before: None,
    ) -> AsyncIterator[None]:
        """Wait for a turn, and have it. Whoever has one must wait neither for another one nor for who may.

        Args:
            whose: Those who ask are served in rotation, however much one of them asks for.
            urgent: Whether somebody waits for what is to be done; asked anew whenever one is admitted. What is not
                urgent comes after all that is.
            told: How many are before this one, now and then while it waits.
        """
        await self._admission(_Waiting(whose, urgent, told))
        over = False

        def end() -> None:
            nonlocal over
            over = True
            self._free += 1
            self._admit()

        timer = asyncio.get_running_loop().call_later(self._longest_s, end)
        try:
            yield
        finally:
            timer.cancel()
            if not over:
                end()

    async def _admission(self, one: _Waiting) -> None:
        self._waiting.append(one)
        self._admit()
        try:
            await one.admitted
        except asyncio.CancelledError:
            if one in self._waiting:
                self._waiting.remove(one)
            elif not one.admitted.cancelled():  # In this very moment it was let in.
                self._free += 1
            self._admit()
            raise

    def _admit(self) -> None:
        """Let in whoever may, and tell the others where they are."""
        while self._free and (order := self._order()):
            one = order[0]
            self._waiting.remove(one)
            self._free -= 1
            self._admissions += 1
            self._served[one.whose] = self._admissions
            one.admitted.set_result(None)
        if self._free == self._at_once:
            self._served.clear()
        now = time.monotonic()
        if not any(now - one.told_at >= TELL_EVERY_S for one in self._waiting):
            return
        for place, one in enumerate(self._order()):
            if place != one.place and now - one.told_at >= TELL_EVERY_S:
                one.place, one.told_at = place, now
                one.told(place)

    def _order(self) -> list[_Waiting]:
        """Those who wait, the next one first: of each who asks the first, then of each the second, and so on."""
        asked: Counter[tuple[bool, str]] = Counter()
        keys: dict[_Waiting, tuple[bool, int, int]] = {}
        waiting = [one for one in self._waiting if not one.admitted.done()]  # Else it is being given up.
        for one in waiting:
            group = not one.urgent(), one.whose
            keys[one] = (group[0], asked[group], self._served.get(one.whose, 0))
            asked[group] += 1
        return sorted(waiting, key=keys.__getitem__)
