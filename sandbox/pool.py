"""Prepared sandboxes: up, with their template imported, waiting for the next kernel of that shape.

How many of a shape are kept follows demand: at least `per_template`, and where they cost little, as many as were asked
for within any `REFILL_S` of the last `MEMORY_S`. They never hold more than `cap_bytes` of memory; the shape that was
asked for longest ago goes first. One more is only made when no start is under way.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxSpec

log = logging.getLogger(__name__)

Shape = tuple[object, ...]

REFILL_S = 2.0
"""Who asks again within this time may find that none was prepared anew yet, so there should have been another."""

MEMORY_S = 30.0
"""How long demand is remembered."""

MOST = 16
"""Of one shape, whatever the demand."""

FORGOTTEN_S = 600.0
"""A shape that nobody has asked for in this time keeps none, if it was not the last one that was asked for."""

EMPTY_BYTES = 8 * 2**20
"""A sandbox with no process but its first takes less."""

RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""After a sandbox that could not be made: what was in the way may have gone."""

RETRY_LAST_S = 60.0
"""From then on, for as long as the shape is not forgotten."""

TEND_S = 5.0
"""How often to look for what is too much."""


class WarmPool:
    """Owns the prepared sandboxes of one keeper."""

    def __init__(
        self,
        make: Callable[[SandboxSpec], Awaitable[LiveSandbox]],
        *,
        per_template: int,
        cap_bytes: int,
        changed: Callable[[LiveSandbox], None] = lambda box: None,
        measure: Callable[[LiveSandbox], int] = lambda box: memory_bytes(box.processes),
        quiet: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make` brings up a sandbox and waits until its template is settled.

        Args:
            make: Raises `WarmcellError` where it cannot.
            per_template: Sandboxes of one shape that are kept whatever the demand. 0: none are kept at all.
            cap_bytes: Most memory of all together.
            changed: Told of a sandbox that has joined the pool or has left it.
            measure: Memory of one in bytes; runs in a thread.
            quiet: Returns when no start is under way.
            clock: Seconds, of any origin.
        """
        self._make = make
        self._per_template = per_template
        self._cap_bytes = cap_bytes
        self._changed = changed
        self._measure = measure
        self._quiet = quiet
        self._clock = clock
        self._ready: dict[Shape, list[LiveSandbox]] = {}
        """In the order in which shapes were last asked for."""
        self._specs: dict[Shape, SandboxSpec] = {}
        self._cheap: set[Shape] = set()
        """Another one is there in an instant and takes little memory."""
        self._asked: dict[Shape, deque[float]] = {}
        """When a sandbox of a shape was asked for, as far back as it is remembered."""
        self._last_asked: dict[Shape, float] = {}
        self._sizes: dict[Shape, int] = {}
        """What the latest of a shape took when it was new."""
        self._filling: dict[Shape, asyncio.Task[None]] = {}
        self._too_large: set[Shape] = set()
        """One alone is more than the cap."""
        self._making_room = asyncio.Lock()
        self._watchers: dict[LiveSandbox, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._tending: asyncio.Task[None] | None = None
        self._closed = False

    def prepared(self) -> Sequence[LiveSandbox]:
        """Those that wait now."""
        return [box for boxes in self._ready.values() for box in boxes]

    def take(self, shape: Shape) -> LiveSandbox | None:
        """A prepared sandbox of that shape, no longer the pool's; None if there is none. Counts as demand."""
        if shape in self._specs:
            self._note(shape)
        while (box := self._leave(shape)) is not None:
            if box.prepared:
                break
            log.warning("prepared sandbox %s was no longer good: %s", box.info.id, box.info.state)
            self._spawn(_stopped(box))
        if shape in self._cheap:
            self._refill(shape)
        return box

    def next(self, shape: Shape) -> LiveSandbox | None:
        """The one that `take` would give. Does not count as demand."""
        boxes = self._ready.get(shape)
        return boxes[-1] if boxes and boxes[-1].prepared else None

    def put_away(self, box: LiveSandbox) -> None:
        """Remove one that was taken, or what was given for it, when no start is under way; returns at once."""
        self._spawn(self._put_away(box))

    def want(self, spec: SandboxSpec, *, cheap: bool = False) -> None:
        """Have sandboxes of this shape ready soon; returns at once.

        Args:
            spec: What they are like.
            cheap: One is made in an instant and takes little memory, so as many are kept as the demand asks for.
        """
        shape = spec.shape()
        if self._closed or not spec.preload or self._per_template == 0 or shape in self._too_large:
            return
        self._ready[shape] = self._ready.pop(shape, [])
        self._specs[shape] = spec
        self._last_asked[shape] = self._clock()
        (self._cheap.add if cheap else self._cheap.discard)(shape)
        self._refill(shape)
        if self._tending is None:
            self._tending = self._spawn(self._tend_always())

    def wanted(self, shape: Shape) -> int:
        """How many of a shape should wait now."""
        floor = self._per_template
        if shape not in self._cheap:
            return floor
        now = self._clock()
        asked = [at for at in self._asked.get(shape, ()) if now - at <= MEMORY_S]
        peak = max((sum(0 <= at - first < REFILL_S for at in asked) for first in asked), default=0)
        forgotten = self._is_forgotten(shape) and shape != next(reversed(self._ready), None)
        return 0 if forgotten else max(floor, min(peak, MOST))

    def _is_forgotten(self, shape: Shape) -> bool:
        now = self._clock()
        return now - self._last_asked.get(shape, now) > FORGOTTEN_S

    async def tend(self) -> None:
        """Stop those that are too many for what is asked for now, or take too much: pages are shared by ever fewer."""
        for shape in list(self._ready):
            asked = self._asked.get(shape)
            while asked and self._clock() - asked[0] > MEMORY_S:
                asked.popleft()
            await self._stop(shape, keep=self.wanted(shape))
        if self.prepared():
            await self._make_room()

    async def shrink(self) -> bool:
        """Stop all that wait, as the machine lacks memory; whether there was any. Demand brings them back."""
        found = bool(self.prepared())
        for shape in list(self._ready):
            await self._stop(shape, keep=0)
        return found

    async def renew(self, good: Callable[[LiveSandbox], bool]) -> None:
        """Stop those that are no longer good."""
        for shape, boxes in list(self._ready.items()):
            for box in [box for box in boxes if not good(box)]:
                if box in self._ready.get(shape, ()):
                    self._ready[shape].remove(box)
                    self._left(box)
                    await self._end(box)

    async def room_beside(self, others: Sequence[LiveSandbox]) -> bool:
        """Whether those that are prepared, and these, leave room for one more like these; never where none is kept."""
        if self._per_template == 0:
            return False
        prepared = self.prepared()
        used = await asyncio.to_thread(self._bytes, [*prepared, *others])
        return used + EMPTY_BYTES <= self._cap_bytes

    async def close(self) -> None:
        """Stop all of them."""
        self._closed = True
        if self._tending is not None:
            self._tending.cancel()
        for task in self._filling.values():
            task.cancel()
        await asyncio.gather(*self._filling.values(), return_exceptions=True)
        for shape in list(self._ready):
            while (box := self._leave(shape)) is not None:
                self._spawn(_stopped(box))
        while self._tasks:  # One may have begun another.
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _note(self, shape: Shape) -> None:
        now = self._clock()
        self._last_asked[shape] = now
        self._asked.setdefault(shape, deque(maxlen=4 * MOST)).append(now)

    def _refill(self, shape: Shape) -> None:
        if not self._closed and shape not in self._filling and shape not in self._too_large:
            self._filling[shape] = self._spawn(self._filled(shape))

    async def _filled(self, shape: Shape) -> None:
        try:
            await self._fill(shape, self._specs[shape])
        finally:  # At once: who takes one in the next moment has to find that nobody is at it.
            del self._filling[shape]

    async def _fill(self, shape: Shape, spec: SandboxSpec) -> None:
        pauses_s = iter(RETRY_PAUSES_S)
        while True:
            if self._quiet is not None:
                await self._quiet()
            if len(self._ready.get(shape, ())) >= self.wanted(shape):
                return
            if not await self._make_room(keep=shape, wanted_bytes=self._sizes.get(shape, 0)):
                return
            box = await self._made(spec)
            if box is None:
                if self._is_forgotten(shape):
                    return
                await asyncio.sleep(next(pauses_s, RETRY_LAST_S))
                continue
            if not box.prepared:
                log.warning("template %s did not become ready; nothing is kept prepared for it", spec.template)
                await self._end(box)
                return
            pauses_s = iter(RETRY_PAUSES_S)
            self._ready.setdefault(shape, []).append(box)
            self._watchers[box] = self._spawn(self._watch(shape, box))
            self._changed(box)
            self._sizes[shape] = await asyncio.to_thread(self._measure, box)
            if not await self._make_room(keep=shape):
                return

    async def _made(self, spec: SandboxSpec) -> LiveSandbox | None:
        """One more, of which the template at least is settled; None where that could not be done now."""
        try:
            box = await self._make(spec)
        except WarmcellError as error:
            log.warning("no sandbox could be prepared for template %s: %s", spec.template, error)
            return None
        except Exception:
            log.exception("no sandbox could be prepared for template %s", spec.template)
            return None
        if not box.ended.is_set():
            return box
        log.warning("prepared sandbox %s ended as it was ready", box.info.id)
        await self._end(box)
        return None

    async def _tend_always(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            await self.tend()

    async def _stop(self, shape: Shape, *, keep: int) -> None:
        while len(self._ready.get(shape, ())) > keep and (box := self._leave(shape)) is not None:
            await self._end(box)

    def _leave(self, shape: Shape) -> LiveSandbox | None:
        """The latest of that shape, no longer the pool's."""
        boxes = self._ready.get(shape)
        if not boxes:
            return None
        box = boxes.pop()
        self._left(box)
        return box

    def _left(self, box: LiveSandbox) -> None:
        watcher = self._watchers.pop(box, None)
        if watcher is not None:
            watcher.cancel()
        self._changed(box)

    async def _watch(self, shape: Shape, box: LiveSandbox) -> None:
        """One that ends while it waits leaves nothing behind."""
        await box.ended.wait()
        del self._watchers[box]
        self._ready[shape].remove(box)
        self._changed(box)
        await self._end(box)

    async def _make_room(self, *, keep: Shape | None = None, wanted_bytes: int = 0) -> bool:
        """Stop prepared sandboxes until the cap holds with `wanted_bytes` more, the least recently wanted first.

        If `keep`, which was just filled, alone exceeds it, none of it is made any more.

        Returns:
            Whether `keep` was spared, and there is room.
        """
        async with self._making_room:
            while await asyncio.to_thread(self._bytes, self.prepared()) + wanted_bytes > self._cap_bytes:
                shape = next((shape for shape, boxes in self._ready.items() if boxes), None)
                if shape is None:
                    return wanted_bytes <= self._cap_bytes
                if wanted_bytes and shape == keep:  # What there is of it is as good as another one.
                    return False
                alone = len(self.prepared()) == 1
                box = self._leave(shape)
                assert box is not None
                log.info("prepared sandbox %s goes: the cap of %d bytes is reached", box.info.id, self._cap_bytes)
                if alone and not wanted_bytes and keep is not None:
                    self._too_large.add(shape)
                    log.warning(
                        "template %s alone needs more than c.Warmcell.prepared_memory; nothing is prepared for it",
                        box.spec.template,
                    )
                await self._end(box)
                if shape == keep:
                    return False
            return True

    async def _put_away(self, box: LiveSandbox) -> None:
        if self._quiet is not None:
            await self._quiet()
        await box.discard()

    async def _end(self, box: LiveSandbox) -> None:
        """Remove it entirely, also if whoever waits for that is cancelled."""
        await asyncio.shield(self._spawn(_stopped(box)))

    def _bytes(self, boxes: Sequence[LiveSandbox]) -> int:
        return sum(self._measure(box) for box in boxes)

    def _spawn(self, what: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("preparing sandboxes failed", exc_info=task.exception())


async def _stopped(box: LiveSandbox) -> None:
    """One that does not end is nobody's reason to look after the others no more."""
    try:
        await box.stop()
    except WarmcellError as error:
        log.warning("prepared sandbox %s does not end: %s", box.info.id, error)


def memory_bytes(pids: Sequence[int]) -> int:
    """Proportional set size of these processes: shared pages count by the share of each."""
    return memory_shares(pids, "Pss")[0]


def memory_shares(pids: Sequence[int], *kinds: str) -> list[int]:
    """As `memory_bytes`, of each of these kinds (`Pss`, `Pss_File`), in bytes."""
    totals = [0] * len(kinds)
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        for line in text.splitlines():
            kind, _, rest = line.partition(":")
            if kind in kinds:
                totals[kinds.index(kind)] += int(rest.split()[0]) * 1024
    return totals
